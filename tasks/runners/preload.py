"""What the fork server loads besides torch, so that no child has to: the kinds of stages, those of plug-ins too."""

from tasks.stage import stage_kinds

stage_kinds()
