"""Scans with a vector state: elementwise, log-sum-exp and max-plus."""

from .elementwise import elementwise_scan, elementwise_scan_step
from .logcumsumexp import logcumsumexp
from .logsumexp import logsumexp_scan, logsumexp_scan_step
from .max_plus import max_plus_scan

__all__ = [
    "elementwise_scan",
    "elementwise_scan_step",
    "logcumsumexp",
    "logsumexp_scan",
    "logsumexp_scan_step",
    "max_plus_scan",
]
