"""Every data set as rows of one schema: readers of what users downloaded, prompts, captions, synthetic people."""

from importlib import import_module


# Where the reader of each source is; it is imported when it is asked for.
SOURCES = {
    "cmu": "cmu.CmuPoses",
    "posescript": "posescript.PoseScript",
    "amass": "amass.AmassMotions",
    "mocap": "mocap.MotionCapture",
    "bedlam": "bedlam.Bedlam",
    "llava": "llava.LlavaInstruct",
    "rpe-refined": "rpe_refined.RpeRefined",
    "synthetic": "synthetic.SyntheticPeople",
}


def find_source(name: str) -> type:
    """
    The class that reads a source.

    Args:
        name (`str`): one of `SOURCES`.
    """
    if name not in SOURCES:
        raise ValueError(f"expected a source of {', '.join(SOURCES)}, got {name!r}")
    module, cls = SOURCES[name].split(".")
    return getattr(import_module(f".{module}", __name__), cls)
