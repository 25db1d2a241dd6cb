"""A run's files on a phone, through adb: `python -m distill.device FOLDER`."""
