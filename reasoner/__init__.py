"""Learns from judged paths: model, kernels, credit, learner, evaluation, report, command line."""
