"""Continual distillation: what students learn with beside their host, and the students."""
