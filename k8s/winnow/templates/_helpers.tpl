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
- name: WINNOW_KV_DTYPE
  value: {{ .Values.model.kvDtype }}
- name: WINNOW_LEASE_S
  value: {{ .Values.decode.leaseSeconds | quote }}
- name: WINNOW_DRAIN_TIMEOUT_S
  value: {{ .Values.decode.drainTimeoutSeconds | quote }}
{{- with include "winnow.modelPath" . }}
- name: WINNOW_MODEL
  value: {{ . | quote }}
{{- end }}
{{- with .Values.model.revision }}
- name: WINNOW_REVISION
  value: {{ . | quote }}
{{- end }}
{{- with .Values.model.name }}
- name: WINNOW_MODEL_NAME
  value: {{ . | quote }}
{{- end }}
{{- with include "winnow.adapterFolders" . }}
- name: WINNOW_ADAPTERS
  value: {{ . | trim | quote }}
{{- end }}
{{- with .Values.adapters.maxAdapters }}
{{- if lt (int .) (len $.Values.adapters.sources) }}
{{- fail (printf "adapters.maxAdapters is %d; adapters.sources names %d" (int .) (len $.Values.adapters.sources)) }}
{{- end }}
- name: WINNOW_MAX_ADAPTERS
  value: {{ . | quote }}
{{- end }}
{{- with .Values.adapters.maxRank }}
- name: WINNOW_MAX_ADAPTER_RANK
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
  value: {{ ternary .Values.model.volume.mountPath "/tmp/huggingface" (and (ne (include "winnow.hasModelVolume" .) "") (eq (include "winnow.isAddress" .) "")) }}
{{- include "winnow.hubEnv" . }}
{{- end }}

{{/* What the hub is asked with. */}}
{{- define "winnow.hubEnv" -}}
{{- with .Values.model.hub }}
{{- if .tokenSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef:
      name: {{ .tokenSecret }}
      key: token
{{- end }}
{{- if .endpoint }}
- name: HF_ENDPOINT
  value: {{ .endpoint | quote }}
{{- end }}
{{- if .offline }}
- name: HF_HUB_OFFLINE
  value: "1"
{{- end }}
{{- end }}
{{- end }}

{{- define "winnow.hasModelVolume" -}}
{{- if or (include "winnow.modelClaim" .) .Values.model.volume.hostPath (include "winnow.isAddress" .) }}yes{{ end -}}
{{- end }}

{{/* Whether an init container copies the model from elsewhere, like s3://bucket/folder. */}}
{{- define "winnow.isAddress" -}}
{{- if contains "://" .Values.model.source }}yes{{ end -}}
{{- end }}

{{- define "winnow.isHubModel" -}}
{{- if regexMatch "^[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9][A-Za-z0-9_.-]*([/@:].*)?$" .Values.model.source }}yes{{ end -}}
{{- end }}

{{/* The model as Winnow is told. */}}
{{- define "winnow.modelPath" -}}
{{- if include "winnow.isAddress" . -}}
{{ .Values.model.volume.mountPath }}/{{ base .Values.model.source }}
{{- else -}}
{{ .Values.model.source }}
{{- end -}}
{{- end }}

{{/* Brings model and adapters before Winnow starts: no probe measures how long that takes. */}}
{{- define "winnow.initContainers" -}}
{{- with printf "%s%s" (include "winnow.fetchModel" .) (include "winnow.fetchAdapters" .) }}
initContainers:
{{ . | trim | indent 2 }}
{{- end }}
{{- end }}

{{- define "winnow.fetchModel" -}}
{{- $fetch := .Values.model.fetch -}}
{{- if include "winnow.isAddress" . }}
{{- if .Values.model.volume.readOnly }}
{{- fail "model.volume.readOnly is set, but model.source is an address, from which the model is copied into the volume" }}
{{- end }}
- name: fetch-model
{{ include "winnow.copy" (list . "model.source" .Values.model.source (include "winnow.modelPath" .)) | indent 2 }}
{{ include "winnow.fetchRest" . | indent 2 }}
{{- else if include "winnow.isHubModel" . }}
- name: fetch-model
  image: {{ include "winnow.image" . }}
  imagePullPolicy: {{ .Values.image.pullPolicy }}
  args: [fetch]
  env:
{{ include "winnow.env" . | indent 4 }}
{{- with $fetch.env }}
{{ toYaml . | indent 4 }}
{{- end }}
{{ include "winnow.fetchRest" . | indent 2 }}
{{- end }}
{{- end }}

{{/* Copies an address into a folder; call with (list $ value-name address folder). */}}
{{- define "winnow.copy" -}}
{{- $top := index . 0 -}}
{{- $what := index . 1 -}}
{{- $source := index . 2 -}}
{{- $fetch := $top.Values.model.fetch -}}
image: {{ required (printf "%s is an address: model.fetch.image needs an image with the program that copies from there, like amazon/aws-cli" $what) $fetch.image }}
imagePullPolicy: {{ $top.Values.image.pullPolicy }}
command:
{{- if $fetch.command }}
{{ toYaml $fetch.command | indent 2 }}
{{- else if hasPrefix "s3://" $source }}
  - aws
  - s3
  - {{ ternary "cp" "sync" (hasSuffix ".gguf" $source) }}
  - --no-progress
  - $(MODEL_SOURCE)
  - $(MODEL_TARGET)
{{- else }}
{{- fail (printf "%s is neither a folder, nor the hub's, nor s3://...: model.fetch.command must say how it is copied" $what) }}
{{- end }}
env:
  - name: MODEL_SOURCE
    value: {{ $source | quote }}
  - name: MODEL_TARGET
    value: {{ index . 3 | quote }}
  - name: HOME
    value: /tmp
{{- with $fetch.env }}
{{ toYaml . | indent 2 }}
{{- end }}
{{- with $fetch.envFromSecret }}
envFrom:
  - secretRef:
      name: {{ . }}
{{- end }}
{{- end }}

{{/* Where Winnow finds an adapter; call with (list name source). */}}
{{- define "winnow.adapterFolder" -}}
{{- if hasPrefix "/" (index . 1) }}{{ index . 1 }}{{ else }}/adapters/{{ index . 0 }}{{ end -}}
{{- end }}

{{- define "winnow.adapterFolders" -}}
{{- range $name, $source := .Values.adapters.sources }}{{ $name }}={{ include "winnow.adapterFolder" (list $name $source) }} {{ end -}}
{{- end }}

{{- define "winnow.fetchesAdapters" -}}
{{- range .Values.adapters.sources }}{{ if not (hasPrefix "/" .) }}yes{{ end }}{{ end -}}
{{- end }}

{{/* Adapters that lie elsewhere come into a volume of the pod's own. */}}
{{- define "winnow.fetchAdapters" -}}
{{- $idx := 0 -}}
{{- range $name, $source := .Values.adapters.sources }}
{{- if not (hasPrefix "/" $source) }}
- name: fetch-adapter-{{ $idx }}
{{- if contains "://" $source }}
{{ include "winnow.copy" (list $ (printf "adapters.sources.%s" $name) $source (include "winnow.adapterFolder" (list $name $source))) | indent 2 }}
{{- else }}
{{- if $.Values.model.hub.offline }}
{{- fail (printf "adapters.sources.%s is of a hub, but model.hub.offline is set: name a folder of the volume" $name) }}
{{- end }}
{{- $parts := splitList "@" $source }}
  image: {{ include "winnow.image" $ }}
  imagePullPolicy: {{ $.Values.image.pullPolicy }}
  command:
    - hf
    - download
    - {{ first $parts | quote }}
    - adapter_config.json
    - adapter_model.safetensors
    - --local-dir
    - {{ include "winnow.adapterFolder" (list $name $source) | quote }}
{{- if rest $parts }}
    - --revision
    - {{ last $parts | quote }}
{{- end }}
  env:
    - name: HOME
      value: /tmp
{{- with include "winnow.hubEnv" $ | trim }}
{{ . | indent 4 }}
{{- end }}
{{- with $.Values.model.fetch.env }}
{{ toYaml . | indent 4 }}
{{- end }}
{{- end }}
{{ include "winnow.fetchLimits" $ | indent 2 }}
  volumeMounts:
    - name: tmp
      mountPath: /tmp
    - name: adapters
      mountPath: /adapters
{{- $idx = add1 $idx }}
{{- end }}
{{- end }}
{{- end }}

{{- define "winnow.fetchLimits" -}}
resources:
{{ toYaml .Values.model.fetch.resources | indent 2 }}
securityContext:
{{ include "winnow.containerSecurity" . | indent 2 }}
{{- end }}

{{- define "winnow.fetchRest" -}}
{{ include "winnow.fetchLimits" . }}
volumeMounts:
  - name: tmp
    mountPath: /tmp
{{- if include "winnow.hasModelVolume" . }}
  - name: models
    mountPath: {{ .Values.model.volume.mountPath }}
{{- if .Values.model.volume.readOnly }}
    readOnly: true
{{- end }}
{{- end }}
{{- end }}

{{/* Of the gateway, besides what every process has. */}}
{{- define "winnow.gatewayEnv" -}}
{{- if gt (int .Values.prefill.gpus) 1 }}
- name: WINNOW_PREFILL_TENSOR_PARALLEL
  value: {{ .Values.prefill.gpus | quote }}
{{- end }}
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
{{ include "winnow.sharedMemory" .Values.prefill }}
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

{{/* The volume that a part's pods mount at /dev/shm; call with .Values.decode or .Values.prefill. */}}
{{- define "winnow.sharedMemory" -}}
- name: shm
  emptyDir:
    medium: Memory
    sizeLimit: {{ .sharedMemory }}
{{- end }}

{{- define "winnow.mounts" -}}
- name: tmp
  mountPath: /tmp
- name: shm
  mountPath: /dev/shm
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
{{- if or .Values.model.volume.readOnly (include "winnow.isAddress" .) }}
  readOnly: true
{{- end }}
{{- end }}
{{- if include "winnow.fetchesAdapters" . }}
- name: adapters
  mountPath: /adapters
  readOnly: true
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
{{- if .Values.model.volume.readOnly }}
    readOnly: true
{{- end }}
{{- else if .Values.model.volume.hostPath }}
- name: models
  hostPath:
    path: {{ .Values.model.volume.hostPath }}
    type: Directory
{{- else if include "winnow.isAddress" . }}
- name: models
  emptyDir: {}
{{- end }}
{{- if include "winnow.fetchesAdapters" . }}
- name: adapters
  emptyDir: {}
{{- end }}
{{- end }}

{{/* Resources with the part's GPUs; call with (list $ .Values.decode). */}}
{{- define "winnow.resources" -}}
{{- $part := index . 1 -}}
requests:
{{ toYaml $part.resources.requests | indent 2 }}
limits:
{{ toYaml $part.resources.limits | indent 2 }}
{{- if $part.gpus }}
  {{ (index . 0).Values.gpu.resource }}: {{ $part.gpus }}
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
{{- if $part.gpus }}
{{- with $top.Values.gpu.runtimeClassName }}
runtimeClassName: {{ . }}
{{- end }}
{{- end }}
{{- with $part.affinity }}
affinity:
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
