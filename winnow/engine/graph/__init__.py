"""The decode step as a recording that is replayed, one for each of some batch sizes."""

from winnow.engine.graph.cuda import CudaGraphs, recorder_for
from winnow.engine.graph.recorder import Recorder, Recording
from winnow.engine.graph.step_graphs import Agree, RecordingFailed, StepGraphs, alone

__all__ = [
    "Agree",
    "CudaGraphs",
    "Recorder",
    "Recording",
    "RecordingFailed",
    "StepGraphs",
    "alone",
    "recorder_for",
]
