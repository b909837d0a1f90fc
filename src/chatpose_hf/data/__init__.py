"""Every data set as rows of one schema: readers of what users downloaded, prompts, captions, synthetic people."""

from importlib import import_module


# Where the reader of each source is; it is imported when it is asked for.
SOURCES = {
    "cmu": "cmu.CmuPoses",
    "posescript": "posescript.PoseScript",
    "amass": "amass.AmassMotions",
    "mocap": "mocap.MotionCapture",
    "hmr2": "hmr2.Hmr2Training",
    "hmr2-evaluation": "hmr2_evaluation.Hmr2Evaluation",
    "3dpw": "threedpw.ThreeDPW",
    "bedlam": "bedlam.Bedlam",
    "llava": "llava.LlavaInstruct",
    "rpe-refined": "rpe_refined.RpeRefined",
    "key-poses": "key_poses.KeyPoses",
    "compositions": "compositions.Compositions",
    "instructions": "instructions.Instructions",
    "chats": "chats.Chats",
    "pose-chats": "pose_chats.PoseChats",
    "synthetic": "synthetic.SyntheticPeople",
    "spg": "spg.Spg",
    "rpe": "rpe.Rpe",
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
    try:
        return getattr(import_module(f".{module}", __name__), cls)
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise ImportError("rows need the package datasets: pip install 'chatpose_hf[data]'") from error
