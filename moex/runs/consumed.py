"""Counts of the data that a run has consumed, as the batch size may change."""

import dataclasses


@dataclasses.dataclass
class Consumed:
    """The amount of data that a run has trained on; saved with its checkpoints."""

    sequences: int = 0  # sequences of the whole job: the position in the data
    tokens: int = 0  # tokens of these sequences, with padding
    targets: int = 0  # how many of these tokens were learned

    @classmethod
    def of(cls, data: dict, seq_len: int) -> "Consumed":
        """Read the counts from the data of a checkpoint.

        Checkpoints of moex before 0.2 have sequences alone: we count them as full ones
        of the present length.
        """
        sequences = data["sequences"]
        full = sequences * seq_len
        return cls(sequences, data.get("tokens", full), data.get("targets", full))
