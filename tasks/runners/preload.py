"""Imports for the fork server besides torch, so that no child needs them: all kinds of stages, also of plug-ins."""

from tasks.stage import stage_kinds

stage_kinds()
