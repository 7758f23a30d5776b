"""Judges: text in, verdict out. Imports neither of the other rooms, nor torch, ray, vllm or trl."""

from verifiers.base import Task, Verdict, Verifier

__all__ = ["Task", "Verdict", "Verifier"]
