"""Measure whether the timesteps of a diffusion model help or hinder each other: ANT's two observations, as tools."""

from dtr_kernels.analysis.affinity import TaskAffinity, task_affinity
from dtr_kernels.analysis.transfer import IntervalSpecialist, negative_transfer_gaps

__all__ = ["IntervalSpecialist", "TaskAffinity", "negative_transfer_gaps", "task_affinity"]
