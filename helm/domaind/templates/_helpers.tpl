{{/* Names. */}}

{{- define "domaind.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* 50 characters at most: names of ours append up to 12, and a Service-like limit of 63 holds for labels. */}}
{{- define "domaind.fullname" -}}
{{- $name := include "domaind.name" . -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else if contains $name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "domaind.namespace" -}}
{{- default .Release.Namespace .Values.namespaceOverride -}}
{{- end -}}

{{/* What selects the daemon's pods. A DaemonSet's selector can never be changed: nothing that a value or a version
changes may enter here. */}}
{{- define "domaind.selectorLabels" -}}
app.kubernetes.io/name: {{ include "domaind.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: daemon
{{- end -}}

{{/* Labels of every resource; call with (list $ "component"). */}}
{{- define "domaind.labels" -}}
{{- $ := index . 0 -}}
app.kubernetes.io/name: {{ include "domaind.name" $ }}
app.kubernetes.io/instance: {{ $.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
app.kubernetes.io/version: {{ $.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: domaind
app.kubernetes.io/managed-by: {{ $.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $.Chart.Name $.Chart.Version | replace "+" "_" }}
{{- with $.Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Begins a resource's metadata; call with (list $ "name" "component"). */}}
{{- define "domaind.metadata" -}}
{{- $ := index . 0 -}}
name: {{ index . 1 }}
namespace: {{ include "domaind.namespace" $ }}
{{ include "domaind.clusterMetadata" (list $ (index . 2)) }}
{{- end -}}

{{/* The same without name and namespace; call with (list $ "component"). */}}
{{- define "domaind.clusterMetadata" -}}
{{- $ := index . 0 -}}
labels:
  {{- include "domaind.labels" . | nindent 2 }}
{{- with $.Values.commonAnnotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "domaind.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "domaind.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Account of the test pod and of the example's pods: clients like any others. */}}
{{- define "domaind.clientServiceAccountName" -}}
{{- include "domaind.fullname" . }}-client
{{- end -}}

{{- define "domaind.image" -}}
{{- $registry := default .Values.image.registry (.Values.global).imageRegistry -}}
{{- $name := .Values.image.repository -}}
{{- with $registry -}}{{- $name = printf "%s/%s" . $name -}}{{- end -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" $name .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (default .Chart.AppVersion .Values.image.tag) -}}
{{- end -}}
{{- end -}}

{{- define "domaind.imagePullSecrets" -}}
{{- with concat ((.Values.global).imagePullSecrets | default list) .Values.imagePullSecrets -}}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end -}}
{{- end -}}

{{/* Where the daemon's part of the node lies. /var/run is /run on every node that we know of; the policy compares
paths as text, so they are written one way. */}}
{{- define "domaind.hostPath" -}}
{{- regexReplaceAll "^/var/run/" .Values.sockets.hostPath "/run/" -}}
{{- end -}}
