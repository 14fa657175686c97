{{/* domaind.toml, key by key: toToml would write YAML's numbers as floats, which the daemon refuses. Strings are
written as JSON, whose escapes TOML has, too. */}}

{{/* What is declared: the values' own, and the example's. */}}
{{- define "domaind.domains" -}}
{{- $domains := .Values.declaredDomains -}}
{{- $example := .Values.clientExample -}}
{{- if $example.enabled -}}
{{- $domains = append $domains (dict "name" $example.domain "bounceBytes" $example.bounceBytes "coherentBytes" $example.coherentBytes) -}}
{{- end -}}
{{- toYaml $domains -}}
{{- end -}}

{{/* The rules: the values' own, and the example's. One rule for each of its pods: the driver's user may not be a device. */}}
{{- define "domaind.rules" -}}
{{- $rules := .Values.policy.rules -}}
{{- $example := .Values.clientExample -}}
{{- if $example.enabled -}}
{{- range $role := list "driver" "device" -}}
{{- $uid := (get $example $role).runAsUser -}}
{{- $rules = append $rules (dict "name" (printf "client-example-%s" $role) "uids" (list $uid) "domains" (list $example.domain) "roles" (list $role)) -}}
{{- end -}}
{{- end -}}
{{- toYaml $rules -}}
{{- end -}}

{{/* One value as TOML. Call with (list $value "kind"), where kind is string, bool, bytes or int, which may also be a
string as the daemon reads it ("0x1000"); a list of such becomes an array. */}}
{{- define "domaind.tomlValue" -}}
{{- $value := index . 0 -}}
{{- $kind := index . 1 -}}
{{- if kindIs "slice" $value -}}
{{- $items := list -}}
{{- range $value -}}{{- $items = append $items (include "domaind.tomlValue" (list . $kind)) -}}{{- end -}}
{{- printf "[%s]" (join ", " $items) -}}
{{- else if eq $kind "bytes" -}}{{- include "domaind.bytes" $value -}}
{{- else if and (eq $kind "int") (not (kindIs "string" $value)) -}}{{- printf "%d" (int64 $value) -}}
{{- else -}}{{- toJson $value -}}
{{- end -}}
{{- end -}}

{{/* `key = value` lines for those keys that the dict has. Call with (list $dict $keys), where keys are
"valueKey toml_key kind". */}}
{{- define "domaind.toml" -}}
{{- $dict := index . 0 -}}
{{- $lines := list -}}
{{- range index . 1 -}}
{{- $key := splitList " " . -}}
{{- if hasKey $dict (index $key 0) -}}
{{- $value := include "domaind.tomlValue" (list (get $dict (index $key 0)) (index $key 2)) -}}
{{- $lines = append $lines (printf "%s = %s" (index $key 1) $value) -}}
{{- end -}}
{{- end -}}
{{- join "\n" $lines -}}
{{- end -}}

{{/* What only a restart can change. */}}
{{- define "domaind.configFixed" -}}
config_version = 1
runtime_dir = "/run/domaind"

[server]
client_gid = {{ int64 .Values.sockets.gid }}
{{- with .Values.config.workerThreads }}
worker_threads = {{ int64 . }}
{{- end }}
{{- if .Values.metrics.enabled }}

[metrics]
listen = {{ printf "%s:%d" .Values.metrics.address (int64 .Values.metrics.port) | toJson }}
{{- end }}
{{- end -}}

{{/* What a reload can change: limits, levels, policy, declared domains. The format of the log, which it cannot, stands
here because a table has one place in TOML; domaind.checksum knows. */}}
{{- define "domaind.configReloadable" -}}
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
{{ include "domaind.toml" (list $rule (list
  "name name string" "uids uids int" "gids gids int" "podUids pod_uids string" "units units string"
  "domains domains string" "roles roles string" "access access string" "create create bool")) }}
{{- end }}
{{- range $domain := include "domaind.domains" . | fromYamlArray }}

[[domains]]
{{ include "domaind.toml" (list $domain (list
  "name name string" "bounceBytes bounce_bytes bytes" "coherentBytes coherent_bytes bytes"
  "iovaLimit iova_limit int" "apertureBase aperture_base int" "granuleBytes granule_bytes bytes"
  "backing backing string" "scrub scrub string" "reserved reserved string" "allowed allowed string"
  "ownerUid owner_uid int")) }}
{{- with $domain.quotas }}

[domains.quotas]
{{ include "domaind.toml" (list . (list
  "sessions sessions int" "mappings mappings int" "memories memories int" "direct direct int" "leases leases int"
  "leaseBytes lease_bytes bytes")) }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "domaind.config" -}}
{{ include "domaind.configFixed" . }}

{{ include "domaind.configReloadable" . }}
{{- end -}}

{{/* Pods are replaced when this changes. */}}
{{- define "domaind.checksum" -}}
{{- if eq .Values.config.restartFor "any" -}}
{{- include "domaind.config" . | sha256sum -}}
{{- else -}}
{{- printf "%s %s" (include "domaind.configFixed" .) .Values.config.log.format | sha256sum -}}
{{- end -}}
{{- end -}}
