"""Every error that the input, not a bug, caused. The message says where, what, the numbers and the remedy."""


class LlmquantError(Exception):
    """Base of all errors that the input, not a bug, caused."""


class ShapeError(LlmquantError):
    """A grid or a file format cannot hold a weight of this shape."""


class FormatError(LlmquantError):
    """A file format cannot hold this grid or this model."""


class RecipeError(LlmquantError):
    """The recipe does not say something we can do."""


class CheckpointError(LlmquantError):
    """A model folder or file is missing something, broken, or not what it says it is."""


class OutputError(LlmquantError):
    """An output or work folder cannot be written, or holds something else."""


class CalibrationError(LlmquantError):
    """Calibration gave a linear too little, or numbers that are not finite."""


class DataError(LlmquantError):
    """The calibration or evaluation text is missing, empty or too short."""


class UnsupportedModel(LlmquantError):  # noqa: N818
    """No model family has a table for this architecture."""


class PlanError(LlmquantError):
    """A run needs more memory, or more of the disk, than there is."""


class NumericsError(LlmquantError):
    """Numbers that should be finite are not."""


class PeerError(LlmquantError):
    """Another process of the same run has stopped."""
