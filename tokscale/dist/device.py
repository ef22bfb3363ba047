"""Which device a process computes on."""


def choose_device(name: str) -> str:
    """The value of a `device` key: `auto` is CUDA when there is one."""
    import torch  # heavy, and listing the stages imports this module

    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
