"""Time series forecasting: closed-form ridge plus a backbone residual, with calibrated quantiles."""

from .data import ForecastData
from .task import Forecaster

__all__ = ["ForecastData", "Forecaster"]
