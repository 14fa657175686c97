{{/* CEL of the admission policies. */}}

{{/* A path without empty and `.` components, and with /var/run read as /run. Call with the expression of the path. */}}
{{- define "domaind.celPath" -}}
[{{ . }}].map(p, '/' + p.split('/').filter(s, s != '' && s != '.').join('/'))
.map(p, (p + '/').startsWith('/var/run/') ? p.substring(4) : p)[0]
{{- end -}}

{{/* Is the path (already as above) the directory of the sockets, or below it? */}}
{{- define "domaind.celIsOurs" -}}
(p.path + '/').startsWith({{ printf "%s/" (include "domaind.hostPath" .) | squote }})
{{- end -}}

{{/* Is it above? */}}
{{- define "domaind.celIsAbove" -}}
p.path == '/' || {{ include "domaind.hostPath" . | squote }}.startsWith(p.path + '/')
{{- end -}}

{{/* Are all mounts of ours in such containers read-only? Call with the field's name. */}}
{{- define "domaind.celMountsReadOnly" -}}
(!has(object.spec.{{ . }}) || object.spec.{{ . }}.all(c, !has(c.volumeMounts) || c.volumeMounts.all(m,
!variables.ours.exists(p, p.name == m.name) || (has(m.readOnly) && m.readOnly))))
{{- end -}}
