{{/* Arithmetic of sizes. */}}

{{/* Bytes of a size: 4096, "4096", "64Mi". The schema has let nothing else through. */}}
{{- define "domaind.bytes" -}}
{{- if kindIs "string" . -}}
{{- $factors := dict "" 1 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 -}}
{{- $digits := regexFind "^[0-9]+" . -}}
{{- mul (atoi $digits) (get $factors (trimPrefix $digits .)) -}}
{{- else -}}
{{- int64 . -}}
{{- end -}}
{{- end -}}

{{/* Bytes that the daemon's container needs for so many bytes of regions: the regions and a seventh of them, or 64 MiB if
that is more. The daemon itself keeps an eighth of its memory free of regions, so that it is never killed for them; with
less than this regions.maxBytes would be a promise that it cannot keep. */}}
{{- define "domaind.memoryNeeded" -}}
{{- $regions := include "domaind.bytes" .Values.regions.maxBytes | int64 -}}
{{- add $regions (max (div (add $regions 6) 7) 67108864) -}}
{{- end -}}

{{/* The memory limit of the daemon's container, as it is written into the pod. */}}
{{- define "domaind.memoryLimit" -}}
{{- $needed := include "domaind.memoryNeeded" . | int64 -}}
{{- with .Values.resources.limits.memory -}}
{{- $given := include "domaind.bytes" . | int64 -}}
{{- if lt $given $needed -}}
{{- fail (printf "resources.limits.memory is %v (%d bytes), but regions.maxBytes %v needs %d bytes (itself, and a seventh of it or 64Mi, whichever is more): raise the one, lower the other, or leave resources.limits.memory empty" . $given $.Values.regions.maxBytes $needed) -}}
{{- end -}}
{{- . -}}
{{- else -}}
{{- /* In whole Mi, rounded up. */ -}}
{{- printf "%dMi" (div (add $needed 1048575) 1048576) -}}
{{- end -}}
{{- end -}}

{{/* Bytes of all declared domains together. An aperture that is not given has 64 MiB, as in CreateDomain; one that is has
whole granules, of huge pages at least 2 MiB. */}}
{{- define "domaind.declaredBytes" -}}
{{- $sum := int64 0 -}}
{{- range $domain := include "domaind.domains" . | fromYamlArray -}}
{{- $unit := include "domaind.bytes" (default 4096 $domain.granuleBytes) | int64 -}}
{{- if eq (default "memfd" $domain.backing) "hugetlb-2m" -}}{{- $unit = max $unit 2097152 -}}{{- end -}}
{{- range $key := list "bounceBytes" "coherentBytes" -}}
{{- $size := ternary (get $domain $key) "64Mi" (hasKey $domain $key) -}}
{{- $bytes := include "domaind.bytes" $size | int64 -}}
{{- $sum = add $sum (mul $unit (div (add $bytes (sub $unit 1)) $unit)) -}}
{{- end -}}
{{- end -}}
{{- $sum -}}
{{- end -}}
