{{/* Pieces of pods. */}}

{{/* Security context of a container that needs nothing. */}}
{{- define "domaind.containerSecurityContext" -}}
allowPrivilegeEscalation: false
privileged: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Security context of a client pod; call with (list $ uid). The group is what lets it connect. */}}
{{- define "domaind.clientPodSecurityContext" -}}
{{- $ := index . 0 -}}
runAsNonRoot: true
runAsUser: {{ int64 (index . 1) }}
runAsGroup: {{ int64 (index . 1) }}
supplementalGroups: [{{ int64 $.Values.sockets.gid }}]
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{/* A client's way to the sockets. The directory, not the sockets: a daemon that is started anew makes new ones, and a
mount of an old one would stay. `Directory` and not `DirectoryOrCreate`: where no daemon is the pod does not start. */}}
{{- define "domaind.clientVolume" -}}
- name: domaind
  hostPath:
    path: {{ include "domaind.hostPath" . }}/public
    type: Directory
{{- end -}}

{{- define "domaind.clientVolumeMount" -}}
- name: domaind
  mountPath: /run/domaind/public
  readOnly: true
{{- end -}}

{{/* How a probe asks; call with (list $ "liveness" "/livez"). Without HTTP a program in the container asks. */}}
{{- define "domaind.probe" -}}
{{- $ := index . 0 -}}
{{- $path := index . 2 -}}
{{- $timing := get $.Values.probes (index . 1) -}}
{{- if and $path $.Values.metrics.enabled -}}
httpGet:
  path: {{ $path }}
  port: metrics
{{- else -}}
exec:
  command: [/usr/bin/domainctl, health, --runtime-dir, /run/domaind, --timeout, {{ printf "%ds" (int64 $timing.timeoutSeconds) }}]
{{- end }}
periodSeconds: {{ int64 $timing.periodSeconds }}
timeoutSeconds: {{ int64 $timing.timeoutSeconds }}
failureThreshold: {{ int64 $timing.failureThreshold }}
{{- end -}}

{{/* Requests and limits of the daemon's container. */}}
{{- define "domaind.resources" -}}
{{- $memory := include "domaind.memoryLimit" . -}}
{{- $huge := .Values.regions.hugepages2Mi -}}
requests:
  cpu: {{ .Values.resources.requests.cpu | quote }}
  memory: {{ $memory }}
  {{- with $huge }}
  hugepages-2Mi: {{ . }}
  {{- end }}
limits:
  {{- with .Values.resources.limits.cpu }}
  cpu: {{ . | quote }}
  {{- end }}
  memory: {{ $memory }}
  {{- with $huge }}
  hugepages-2Mi: {{ . }}
  {{- end }}
{{- end -}}
