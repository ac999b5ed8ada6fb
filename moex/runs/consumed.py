"""How much of the data a run has consumed: counted, never step x present batch."""

import dataclasses


@dataclasses.dataclass
class Consumed:
    """How much of the data a run has trained on; saved with its checkpoints."""

    sequences: int = 0  # of the whole job: the position in the data
    tokens: int = 0  # of these sequences, padding too
    targets: int = 0  # of these tokens, those that were learned

    @classmethod
    def of(cls, data: dict, seq_len: int) -> "Consumed":
        """Read the counts from the data of a checkpoint.

        Checkpoints of moex before 0.2 have sequences alone: they count as full ones of
        the present length.
        """
        sequences = data["sequences"]
        full = sequences * seq_len
        return cls(sequences, data.get("tokens", full), data.get("targets", full))
