{{- define "homeostat.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* Short enough for the number that a StatefulSet adds, and the hash that its pods' label gets. */}}
{{- define "homeostat.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" }}
{{- else if contains (include "homeostat.name" .) .Release.Name }}
{{- .Release.Name | trunc 52 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "homeostat.name" .) | trunc 52 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "homeostat.selector" -}}
app.kubernetes.io/name: {{ include "homeostat.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: worker
{{- end }}

{{- define "homeostat.labels" -}}
{{ include "homeostat.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "homeostat.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "homeostat.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "homeostat.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end }}
{{- end }}

{{/* What the image needs, and no more: its user, nothing of root's, nothing to write to but its volumes. */}}
{{- define "homeostat.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "homeostat.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* With a certificate the worker speaks HTTPS alone. */}}
{{- define "homeostat.scheme" -}}
{{- $found := dict "scheme" (ternary "HTTPS" "HTTP" (hasKey .Values.config "HOMEOSTAT_HTTPS__SSL_CERTFILE")) }}
{{- range .Values.secrets }}
{{- if eq .variable "HOMEOSTAT_HTTPS__SSL_CERTFILE" }}{{ $_ := set $found "scheme" "HTTPS" }}{{ end }}
{{- end }}
{{- $found.scheme }}
{{- end }}

{{/* A number stays as it is written: 268435456 would become 2.68435456e+08. */}}
{{- define "homeostat.value" -}}
{{- if kindIs "string" . }}{{ . }}{{ else }}{{ toJson . }}{{ end }}
{{- end }}

{{/* Servers and topic of a kafka:// address, as JSON; fails where it is none. */}}
{{- define "homeostat.kafka" -}}
{{- $source := default "" .Values.config.HOMEOSTAT_SOURCE }}
{{- $keda := .Values.autoscaling.keda }}
{{- $servers := default (regexReplaceAll "^kafka://([^/]+)/.*$|^.*$" $source "${1}") $keda.bootstrapServers }}
{{- $topic := default (regexReplaceAll "^kafka://[^/]+/([^?]+).*$|^.*$" $source "${1}") $keda.topic }}
{{- if not (and $servers $topic) }}
{{- fail "autoscaling.kind=keda: config.HOMEOSTAT_SOURCE is no kafka:// address; set autoscaling.keda.bootstrapServers and .topic" }}
{{- end }}
{{- dict "servers" $servers "topic" $topic | toJson }}
{{- end }}

{{/* What the schema can't say. */}}
{{- define "homeostat.check" -}}
{{- $drain := float64 (default 20 .Values.config.HOMEOSTAT_DRAIN_TIMEOUT_S) }}
{{- if le (float64 .Values.terminationGracePeriodSeconds) $drain }}
{{- fail (printf "terminationGracePeriodSeconds=%v: not longer than HOMEOSTAT_DRAIN_TIMEOUT_S=%v, so a drain would be cut off" .Values.terminationGracePeriodSeconds $drain) }}
{{- end }}
{{- range .Values.secrets }}
{{- if hasKey $.Values.config .variable }}
{{- fail (printf "%s is in config and in secrets" .variable) }}
{{- end }}
{{- end }}
{{- if and .Values.bundle.volume .Values.config.HOMEOSTAT_BUNDLE }}
{{- fail "HOMEOSTAT_BUNDLE is in config, and bundle.volume sets it" }}
{{- end }}
{{- if gt (int .Values.autoscaling.minReplicas) (int .Values.autoscaling.maxReplicas) }}
{{- fail "autoscaling.minReplicas is above maxReplicas" }}
{{- end }}
{{- end }}
