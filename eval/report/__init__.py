"""Reports of task evaluations: JSON for machines, one self-contained page for people, Markdown for pull requests."""
