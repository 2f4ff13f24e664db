"""cuda"""

differentiable = False


def unavailable() -> str | None:
    return "not written yet"


def refuses(device_type, dtype) -> str | None:
    return None
