"""Tasks as data: a task is a folder with a `task.yaml`; `data` loads it, `images` decodes, `metrics` scores."""
