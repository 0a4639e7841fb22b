from .callbacks import EpochSeed, UntrainedCandidate
from .checkpoint import RunCheckpoint, read_checkpoint
from .module import DomainModule, MetricInfo

__all__ = [
    "DomainModule",
    "EpochSeed",
    "MetricInfo",
    "RunCheckpoint",
    "UntrainedCandidate",
    "read_checkpoint",
]
