"""Recordings: a session kept as open files, to be read without the model. docs/recordings.md describes the format.

with session.record("runs/today"):
    model.generate(**inputs)

recording = moe_debugger.open_recording("runs/today")
recording.decisions()
"""

from moe_debugger.recording.joined import JoinedDecisions, JoinedRecording, join_recordings
from moe_debugger.recording.manifest import GroupManifest, Manifest, ModelIdentity, PartEntry
from moe_debugger.recording.reader import Recording, ReplayBatch, Verification, open_recording
from moe_debugger.recording.recorder import Recorder, RecorderStatistics
from moe_debugger.recording.republish import ReplayProgress, replay_to_fleet

__all__ = [
    "GroupManifest",
    "JoinedDecisions",
    "JoinedRecording",
    "Manifest",
    "ModelIdentity",
    "PartEntry",
    "Recorder",
    "RecorderStatistics",
    "Recording",
    "ReplayBatch",
    "ReplayProgress",
    "Verification",
    "join_recordings",
    "open_recording",
    "replay_to_fleet",
]
