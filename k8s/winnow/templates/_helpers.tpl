{{- define "winnow.name" -}}
{{- if .Values.nameOverride }}{{ .Values.nameOverride }}{{ else if contains "winnow" .Release.Name }}{{ .Release.Name }}{{ else }}{{ printf "%s-winnow" .Release.Name }}{{ end -}}
{{- end }}

{{/* Of the API, inside the cluster. */}}
{{- define "winnow.url" -}}
{{- $scheme := ternary "https" "http" (ne .Values.gateway.tlsSecret "") -}}
{{ $scheme }}://{{ include "winnow.name" . }}:{{ .Values.gateway.service.port }}
{{- end }}

{{- define "winnow.image" -}}
{{- $suffix := ternary "-cuda" "" (hasPrefix "cuda" .Values.model.device) -}}
{{ .Values.image.repository }}:{{ default (printf "%s%s" .Chart.AppVersion $suffix) .Values.image.tag }}
{{- end }}

{{/* Labels of one part; call with (list $ "decode"). */}}
{{- define "winnow.selector" -}}
{{- $top := index . 0 -}}
app.kubernetes.io/name: winnow
app.kubernetes.io/instance: {{ $top.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end }}

{{- define "winnow.labels" -}}
{{ include "winnow.selector" . }}
{{- $top := index . 0 }}
app.kubernetes.io/version: {{ $top.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $top.Release.Service }}
helm.sh/chart: {{ $top.Chart.Name }}-{{ $top.Chart.Version }}
{{- end }}

{{- define "winnow.serviceAccount" -}}
{{- if .Values.serviceAccount.create }}{{ default (include "winnow.name" .) .Values.serviceAccount.name }}{{ else }}{{ default "default" .Values.serviceAccount.name }}{{ end -}}
{{- end }}

{{- define "winnow.podSecurity" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- define "winnow.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "winnow.redisSecret" -}}
{{ default (printf "%s-redis" (include "winnow.name" .)) .Values.redis.existingSecret }}
{{- end }}

{{- define "winnow.modelClaim" -}}
{{- with .Values.model.volume }}{{ if .existingClaim }}{{ .existingClaim }}{{ else if .size }}{{ include "winnow.name" $ }}-models{{ end }}{{ end -}}
{{- end }}

{{/* Settings that every process shares, as environment. */}}
{{- define "winnow.env" -}}
- name: WINNOW_REDIS_URL
  valueFrom:
    secretKeyRef:
      name: {{ include "winnow.redisSecret" . }}
      key: {{ .Values.redis.existingSecretKey }}
- name: WINNOW_NAMESPACE
  value: {{ include "winnow.name" . }}
- name: WINNOW_LOG_LEVEL
  value: {{ .Values.logs.level }}
- name: WINNOW_LOG_FORMAT
  value: {{ .Values.logs.format }}
- name: WINNOW_DEVICE
  value: {{ .Values.model.device | quote }}
- name: WINNOW_DTYPE
  value: {{ .Values.model.dtype }}
- name: WINNOW_LEASE_S
  value: {{ .Values.decode.leaseSeconds | quote }}
- name: WINNOW_DRAIN_TIMEOUT_S
  value: {{ .Values.decode.drainTimeoutSeconds | quote }}
{{- with .Values.model.source }}
- name: WINNOW_MODEL
  value: {{ . | quote }}
{{- end }}
{{- with .Values.model.name }}
- name: WINNOW_MODEL_NAME
  value: {{ . | quote }}
{{- end }}
{{- with .Values.pruning }}
- name: WINNOW_PRUNING
  value: {{ toJson . | quote }}
{{- end }}
{{- range $name, $value := .Values.settings }}
- name: WINNOW_{{ upper $name }}
  value: {{ ternary $value (toJson $value) (kindIs "string" $value) | quote }}
{{- end }}
{{- if .Values.redis.caSecret }}
- name: WINNOW_REDIS_CA_FILE
  value: /etc/winnow/redis/ca.crt
{{- end }}
{{- if .Values.peerTlsSecret }}
- name: WINNOW_PEER_CERT_FILE
  value: /etc/winnow/peer/tls.crt
- name: WINNOW_PEER_KEY_FILE
  value: /etc/winnow/peer/tls.key
- name: WINNOW_PEER_CA_FILE
  value: /etc/winnow/peer/ca.crt
{{- end }}
- name: HOME
  value: /tmp
- name: HF_HOME
  value: {{ ternary .Values.model.volume.mountPath "/tmp/huggingface" (ne (include "winnow.hasModelVolume" .) "") }}
{{- end }}

{{- define "winnow.hasModelVolume" -}}
{{- if or (include "winnow.modelClaim" .) .Values.model.volume.hostPath }}yes{{ end -}}
{{- end }}

{{/* Of the gateway, besides what every process has. */}}
{{- define "winnow.gatewayEnv" -}}
- name: WINNOW_HOST
  value: 0.0.0.0
- name: WINNOW_DECODE_HOST
  value: 0.0.0.0
- name: WINNOW_GATEWAY_METRICS_PORT
  value: "9400"
- name: WINNOW_PREFILL_METRICS_PORT
  value: "9401"
{{- if .Values.gateway.tlsSecret }}
- name: WINNOW_TLS_CERT_FILE
  value: /etc/winnow/tls/tls.crt
- name: WINNOW_TLS_KEY_FILE
  value: /etc/winnow/tls/tls.key
{{- end }}
{{- if .Values.gateway.apiKeysSecret }}
- name: WINNOW_API_KEYS_FILE
  value: /etc/winnow/keys/keys.yaml
{{- end }}
{{- end }}

{{- define "winnow.gatewayMounts" -}}
{{ include "winnow.mounts" . }}
- name: shm
  mountPath: /dev/shm
{{- if .Values.gateway.tlsSecret }}
- name: tls
  mountPath: /etc/winnow/tls
  readOnly: true
{{- end }}
{{- if .Values.gateway.apiKeysSecret }}
- name: api-keys
  mountPath: /etc/winnow/keys
  readOnly: true
{{- end }}
{{- end }}

{{- define "winnow.gatewayVolumes" -}}
{{ include "winnow.volumes" . }}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ .Values.prefill.sharedMemory }}
{{- with .Values.gateway.tlsSecret }}
- name: tls
  secret:
    secretName: {{ . }}
{{- end }}
{{- with .Values.gateway.apiKeysSecret }}
- name: api-keys
  secret:
    secretName: {{ . }}
{{- end }}
{{- end }}

{{- define "winnow.mounts" -}}
- name: tmp
  mountPath: /tmp
{{- if .Values.redis.caSecret }}
- name: redis-ca
  mountPath: /etc/winnow/redis
  readOnly: true
{{- end }}
{{- if .Values.peerTlsSecret }}
- name: peer-tls
  mountPath: /etc/winnow/peer
  readOnly: true
{{- end }}
{{- if include "winnow.hasModelVolume" . }}
- name: models
  mountPath: {{ .Values.model.volume.mountPath }}
{{- end }}
{{- end }}

{{- define "winnow.volumes" -}}
- name: tmp
  emptyDir: {}
{{- with .Values.redis.caSecret }}
- name: redis-ca
  secret:
    secretName: {{ . }}
    items:
      - {key: ca.crt, path: ca.crt}
{{- end }}
{{- with .Values.peerTlsSecret }}
- name: peer-tls
  secret:
    secretName: {{ . }}
{{- end }}
{{- if include "winnow.modelClaim" . }}
- name: models
  persistentVolumeClaim:
    claimName: {{ include "winnow.modelClaim" . }}
{{- else if .Values.model.volume.hostPath }}
- name: models
  hostPath:
    path: {{ .Values.model.volume.hostPath }}
    type: Directory
{{- end }}
{{- end }}

{{/* Resources with the part's GPUs; call with .Values.decode or .Values.prefill. */}}
{{- define "winnow.resources" -}}
requests:
{{ toYaml .resources.requests | indent 2 }}
limits:
{{ toYaml .resources.limits | indent 2 }}
{{- if .gpus }}
  nvidia.com/gpu: {{ .gpus }}
{{- end }}
{{- end }}

{{/* Where a part's pods may run; call with (list $ "decode" .Values.decode). */}}
{{- define "winnow.placement" -}}
{{- $top := index . 0 -}}
{{- $part := index . 2 -}}
serviceAccountName: {{ include "winnow.serviceAccount" $top }}
automountServiceAccountToken: false
enableServiceLinks: false  # they would be WINNOW_* variables, which are refused when unknown
securityContext:
{{ include "winnow.podSecurity" $top | indent 2 }}
{{- with $top.Values.imagePullSecrets }}
imagePullSecrets:
{{ toYaml . | indent 2 }}
{{- end }}
{{- with $part.nodeSelector }}
nodeSelector:
{{ toYaml . | indent 2 }}
{{- end }}
{{- with $part.tolerations }}
tolerations:
{{ toYaml . | indent 2 }}
{{- end }}
topologySpreadConstraints:
  - maxSkew: 1
    topologyKey: kubernetes.io/hostname
    whenUnsatisfiable: ScheduleAnyway
    labelSelector:
      matchLabels:
{{ include "winnow.selector" (list $top (index . 1)) | indent 8 }}
{{- end }}
