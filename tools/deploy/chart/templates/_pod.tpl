{{/* What selects the pods of one part. Called with (dict "root" $ "part" NAME). */}}
{{- define "zsfl.selector" -}}
app.kubernetes.io/name: zsfl
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .part }}
{{- end }}

{{- define "zsfl.labels" -}}
{{ include "zsfl.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ .root.Chart.Name }}-{{ .root.Chart.Version }}
{{- end }}

{{/* A pod of one part: (dict "root" $ "part" NAME "values" VALUES "run" COMMAND-AND-ARGS "env" MAP "gpus" N "volumes" LIST). */}}
{{- define "zsfl.pod" -}}
metadata:
  labels: {{- include "zsfl.labels" . | nindent 4 }}
  annotations:
    # With another job these are other pods.
    checksum/job: {{ .root.Values.job | sha256sum }}
    # So that kubectl does not say each time which one it has chosen.
    kubectl.kubernetes.io/default-container: node
spec:
  automountServiceAccountToken: false
  # Or a service called zsfl would set ZSFL_PORT.
  enableServiceLinks: false
  # SIGTERM has a node finish what it has in hand and hand over, which takes 40 s at the most.
  terminationGracePeriodSeconds: 60
  securityContext:
    runAsNonRoot: true
    runAsUser: 10001
    runAsGroup: 10001
    fsGroup: 10001
    fsGroupChangePolicy: OnRootMismatch
    seccompProfile: { type: RuntimeDefault }
  {{- with .root.Values.image.pullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .values.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .values.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
  initContainers:
    # A secret's files are the group's to read, and zsfl takes no key that others may read.
    - name: keys
      image: {{ include "zsfl.image" . }}
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      command: [/bin/sh, -c, "umask 077 && mkdir -p /keys/own && cp -f /secret/* /keys/own/"]
      securityContext: {{- include "zsfl.container" . | nindent 8 }}
      volumeMounts:
        - { name: secret, mountPath: /secret, readOnly: true }
        - { name: keys, mountPath: /keys }
  containers:
    - name: node
      image: {{ include "zsfl.image" . }}
      imagePullPolicy: {{ .root.Values.image.pullPolicy }}
      {{- toYaml .run | nindent 6 }}
      env:
        - { name: POD_NAME, valueFrom: { fieldRef: { fieldPath: metadata.name } } }
        - { name: POD_IP, valueFrom: { fieldRef: { fieldPath: status.podIP } } }
        {{- if ne .part "split-servers" }}
        - { name: POD_INDEX, valueFrom: { fieldRef: { fieldPath: "metadata.labels['apps.kubernetes.io/pod-index']" } } }
        {{- end }}
        {{- range $name, $value := fromYaml (include "zsfl.settings" .) }}
        - { name: ZSFL_{{ upper $name }}, value: {{ $value | toString | quote }} }
        {{- end }}
        {{- range $name, $value := .env }}
        - { name: {{ $name }}, value: {{ $value | quote }} }
        {{- end }}
      ports:
        - { name: control, containerPort: 7700 }
        - { name: metrics, containerPort: 9464 }
      # Until it answers for the first time, an hour for a large model or much data to be loaded.
      startupProbe: { httpGet: { path: /healthz, port: metrics }, periodSeconds: 2, failureThreshold: 1800 }
      livenessProbe: { httpGet: { path: /healthz, port: metrics }, periodSeconds: 10, timeoutSeconds: 5, failureThreshold: 6 }
      # A StatefulSet replaces a pod once the one before is ready: to be so must not take another that is still to be
      # replaced, as the aggregator is of one that stands by, and most clients are of an aggregator.
      readinessProbe: { httpGet: { path: {{ eq .part "split-servers" | ternary "/readyz" "/healthz" }}, port: metrics }, periodSeconds: 5, timeoutSeconds: 5 }
      resources: {{- include "zsfl.resources" . | nindent 8 }}
      securityContext: {{- include "zsfl.container" . | nindent 8 }}
      volumeMounts:
        - { name: job, mountPath: /job, readOnly: true }
        - { name: keys, mountPath: /keys }
        - { name: runs, mountPath: /runs }
        - { name: tmp, mountPath: /tmp }
        {{- if .data }}
        - { name: data, mountPath: /data, readOnly: true }
        {{- end }}
  volumes:
    - { name: job, configMap: { name: {{ .root.Release.Name }}-job } }
    - { name: secret, secret: { secretName: {{ .root.Values.keys }} } }
    - { name: keys, emptyDir: { medium: Memory } }
    - { name: tmp, emptyDir: {} }
    {{- if ne .part "aggregators" }}
    # What a container that is killed had spilled is still there when it comes back.
    - { name: runs, emptyDir: {} }
    {{- end }}
    {{- with .volume }}
    - {{- toYaml (merge (dict "name" "data") .) | nindent 6 }}
    {{- end }}
{{- end }}

{{/* Settings of a node; those that are given win. Whole numbers of a file of values come as floats. */}}
{{- define "zsfl.settings" -}}
{{- $known := dict "name" "$(POD_NAME)" "host" "$(POD_IP)" "port" "7700" "metrics" "$(POD_IP):9464" }}
{{- $_ := mergeOverwrite $known (dict "mdns" "false" "dns" (printf "%s-aggregators:7700" .root.Release.Name)) }}
{{- $_ := mergeOverwrite $known (dict "cluster" .root.Release.Name "clients" (toString .root.Values.shards)) }}
{{- $_ := mergeOverwrite $known (dict "keys" "/keys/own" "runs" "/runs") }}
{{- /* The run goes on after a restart, begins if there is none, and is left alone once it is finished. */}}
{{- $_ := set $known "service" "true" }}
{{- /* Or Kubernetes, which knows no end that is not to be followed by another start, would start it again and again. */}}
{{- $_ := set $known "stay" "true" }}
{{- /* A week for the others to appear, and half an hour for a pod that is moved in the middle of a run. */}}
{{- $_ := mergeOverwrite $known (dict "join_s" "604800" "patience_s" "1800") }}
{{- range $name, $value := .root.Values.settings }}
{{- if kindIs "float64" $value }}
{{- $value = ternary (int64 $value) $value (eq (floor $value) $value) }}
{{- end }}
{{- $_ := set $known $name (toString $value) }}
{{- end }}
{{- toYaml $known }}
{{- end }}

{{- define "zsfl.image" -}}
{{ printf "%s:%s" .root.Values.image.repository .root.Values.image.tag | quote }}
{{- end }}

{{- define "zsfl.container" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: { drop: [ALL] }
{{- end }}

{{- define "zsfl.resources" -}}
{{- $asked := deepCopy .values.resources }}
{{- if .gpus }}
{{- $asked = mergeOverwrite $asked (dict "limits" (dict "nvidia.com/gpu" (toString .gpus))) }}
{{- end }}
{{- toYaml $asked }}
{{- end }}
