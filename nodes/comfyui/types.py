"""The pack's own link types."""

from comfy_api.latest import io

StateType = io.Custom("FLOWCACHE_STATE")  # flowcache_core.state.State
ReportType = io.Custom("FLOWCACHE_REPORT")  # flowcache_core.report.Report
StreamType = io.Custom("FLOWCACHE_STREAM")  # comfyui.stream.StreamSettings
ResumeType = io.Custom("FLOWCACHE_RESUME")  # comfyui.resume.ResumeSettings
