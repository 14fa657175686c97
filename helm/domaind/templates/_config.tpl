{{/* domaind.toml, key by key: toToml would write YAML's numbers as floats, which the daemon refuses. Strings are
written as JSON, whose escapes TOML has, too. */}}

{{/* What is declared: the values' own, and the example's. */}}
{{- define "domaind.domains" -}}
{{- $domains := .Values.declaredDomains -}}
{{- with .Values.clientExample -}}
{{- if .enabled -}}
{{- $domains = append $domains (dict "name" .domain "bounceBytes" .bounceBytes "coherentBytes" .coherentBytes) -}}
{{- end -}}
{{- end -}}
{{- toYaml $domains -}}
{{- end -}}

{{/* The rules: the values' own, and the example's. One rule for each of its pods: the driver's user may not be a device. */}}
{{- define "domaind.rules" -}}
{{- $rules := .Values.policy.rules -}}
{{- with .Values.clientExample -}}
{{- if .enabled -}}
{{- $rules = append $rules (dict "name" "client-example-driver" "uids" (list .driver.runAsUser) "domains" (list .domain) "roles" (list "driver")) -}}
{{- $rules = append $rules (dict "name" "client-example-device" "uids" (list .device.runAsUser) "domains" (list .domain) "roles" (list "device")) -}}
{{- end -}}
{{- end -}}
{{- toYaml $rules -}}
{{- end -}}

{{/* One `key = value` line for a key of the dict, if it has it. Call with (list $dict "valueKey" "toml_key" "kind"),
where kind is string, strings, int, ints, bytes or bool. */}}
{{- define "domaind.toml" -}}
{{- $dict := index . 0 -}}
{{- $key := index . 1 -}}
{{- $kind := index . 3 -}}
{{- if hasKey $dict $key -}}
{{- $value := get $dict $key -}}
{{- $items := list -}}
{{- range ternary $value (list $value) (kindIs "slice" $value) -}}
{{- if hasPrefix "int" $kind -}}{{- $items = append $items (printf "%d" (int64 .)) -}}
{{- else if eq $kind "bytes" -}}{{- $items = append $items (include "domaind.bytes" .) -}}
{{- else -}}{{- $items = append $items (toJson .) -}}
{{- end -}}
{{- end -}}
{{- $text := join ", " $items -}}
{{- if kindIs "slice" $value -}}{{- $text = printf "[%s]" $text -}}{{- end -}}
{{- printf "%s = %s\n" (index . 2) $text -}}
{{- end -}}
{{- end -}}

{{- define "domaind.config" -}}
config_version = 1
runtime_dir = "/run/domaind"

[server]
client_gid = {{ int64 .Values.sockets.gid }}
{{- with .Values.config.workerThreads }}
worker_threads = {{ int64 . }}
{{- end }}
{{- if .Values.metrics.enabled }}

[metrics]
listen = {{ printf "0.0.0.0:%d" (int64 .Values.metrics.port) | toJson }}
{{- end }}

[limits]
region_bytes = {{ include "domaind.bytes" .Values.regions.maxBytes }}
ack_timeout_ms = {{ int64 .Values.config.ackTimeoutMs }}

[log]
format = {{ toJson .Values.config.log.format }}
level = {{ toJson .Values.config.log.level }}

[policy]
default = {{ toJson .Values.policy.default }}
advisory_read_only = {{ .Values.policy.advisoryReadOnly }}
allow_unattested = {{ eq .Values.identity.mode "uid" }}
{{- range $rule := include "domaind.rules" . | fromYamlArray }}

[[policy.rules]]
{{ include "domaind.toml" (list $rule "name" "name" "string") -}}
{{ include "domaind.toml" (list $rule "uids" "uids" "ints") -}}
{{ include "domaind.toml" (list $rule "gids" "gids" "ints") -}}
{{ include "domaind.toml" (list $rule "podUids" "pod_uids" "strings") -}}
{{ include "domaind.toml" (list $rule "units" "units" "strings") -}}
{{ include "domaind.toml" (list $rule "domains" "domains" "strings") -}}
{{ include "domaind.toml" (list $rule "roles" "roles" "strings") -}}
{{ include "domaind.toml" (list $rule "access" "access" "string") -}}
{{ include "domaind.toml" (list $rule "create" "create" "bool") -}}
{{- end }}
{{- range $domain := include "domaind.domains" . | fromYamlArray }}

[[domains]]
{{ include "domaind.toml" (list $domain "name" "name" "string") -}}
{{ include "domaind.toml" (list $domain "bounceBytes" "bounce_bytes" "bytes") -}}
{{ include "domaind.toml" (list $domain "coherentBytes" "coherent_bytes" "bytes") -}}
{{ include "domaind.toml" (list $domain "iovaLimit" "iova_limit" "int") -}}
{{ include "domaind.toml" (list $domain "apertureBase" "aperture_base" "bytes") -}}
{{ include "domaind.toml" (list $domain "granuleBytes" "granule_bytes" "bytes") -}}
{{ include "domaind.toml" (list $domain "backing" "backing" "string") -}}
{{ include "domaind.toml" (list $domain "scrub" "scrub" "string") -}}
{{ include "domaind.toml" (list $domain "ownerUid" "owner_uid" "int") -}}
{{- end }}
{{- end -}}
