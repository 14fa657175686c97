{{/* What the schema cannot say, or could not say well: contradictions between values, each with what to do. */}}
{{- define "domaind.checks" -}}
{{- if eq (toString .Values.enabled) "false" -}}
{{- fail "enabled is false, yet the chart is rendered: it is for the `condition` of a chart that depends on this one" -}}
{{- end -}}
{{- if hasKey .Values.updateStrategy.rollingUpdate "maxSurge" -}}
{{- fail "updateStrategy.rollingUpdate.maxSurge: a second daemon cannot serve the same directory, and there is no hand-over between them yet; leave it out (maxUnavailable says how many nodes at a time)" -}}
{{- end -}}
{{- if and (not .Values.hostPID) (ne .Values.identity.mode "uid") -}}
{{- fail "hostPID is false: the daemon cannot see its clients and would refuse them all; set identity.mode to uid, and know that pods are then told apart by uid and groups alone" -}}
{{- end -}}
{{- if eq .Values.identity.mode "uid" -}}
{{- range .Values.policy.rules -}}
{{- if or .podUids .units -}}
{{- fail (printf "policy.rules: rule %q selects by podUids or units, which identity.mode uid does not know" .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- $regions := include "domaind.bytes" .Values.regions.maxBytes | int64 -}}
{{- $declared := include "domaind.declaredBytes" . | int64 -}}
{{- if gt $declared $regions -}}
{{- fail (printf "the declared domains need %d bytes together, regions.maxBytes is %v (%d bytes)" $declared .Values.regions.maxBytes $regions) -}}
{{- end -}}
{{- with .Values.regions.hugepages2Mi -}}
{{- $huge := include "domaind.bytes" . | int64 -}}
{{- if or (gt $huge $regions) (mod $huge 2097152) -}}
{{- fail (printf "regions.hugepages2Mi is %v (%d bytes): it must be whole pages of 2Mi and at most regions.maxBytes, %v (%d bytes)" . $huge $.Values.regions.maxBytes $regions) -}}
{{- end -}}
{{- end -}}
{{- $names := list -}}
{{- range include "domaind.domains" . | fromYamlArray -}}
{{- if has .name $names -}}{{- fail (printf "declaredDomains: there are two domains %q (clientExample.domain is one of them if the example is enabled)" .name) -}}{{- end -}}
{{- $names = append $names .name -}}
{{- if and (eq (default "memfd" .backing) "hugetlb-2m") (not $.Values.regions.hugepages2Mi) -}}
{{- fail (printf "declaredDomains: %q has backing hugetlb-2m, but regions.hugepages2Mi gives the daemon no huge pages" .name) -}}
{{- end -}}
{{- end -}}
{{- $names = list -}}
{{- range include "domaind.rules" . | fromYamlArray -}}
{{- if has .name $names -}}{{- fail (printf "policy.rules: there are two rules %q (client-example-driver and client-example-device are the example's)" .name) -}}{{- end -}}
{{- $names = append $names .name -}}
{{- end -}}
{{- range concat .Values.extraInitContainers .Values.extraContainers -}}
{{- if not (dig "resources" "limits" "memory" "" .) -}}
{{- fail (printf "extraInitContainers, extraContainers: %q has no resources.limits.memory; a container without would cost the pod its quality of service" .name) -}}
{{- end -}}
{{- end -}}
{{- end -}}
