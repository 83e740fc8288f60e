"""TRL's trainer with a weight for every token; used only where weights differ (see `weighting` for the loss).

TRL 1.16 sums the negative log-likelihoods of its fused head and divides by a count of tokens. Here the head's output is
multiplied by the weights on its way out, and the count is their sum; everything else stays TRL's. Import it late.
"""

from typing import Any

import torch
from torch import Tensor
from trl import pack_dataset

from workbench.finetuning.packing import IGNORED
from workbench.finetuning.trainer import QuietTrainer


class WeightedTrainer(QuietTrainer):
    """Rows bring a column `weights`, packed and padded like their labels."""

    data_collator: Any
    _signature_columns: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        collate = self.data_collator

        def with_weights(rows: list[dict[str, Any]]) -> dict[str, Any]:
            batch = collate(rows)
            own = [torch.tensor(row["weights"], dtype=torch.float32) for row in rows]
            own = [torch.cat(own)] if self.padding_free else own
            batch["weights"] = torch.nn.utils.rnn.pad_sequence(own, batch_first=True)
            return batch

        self.data_collator = with_weights

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "weights" not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, "weights"]

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """As TRL does with ready tokens, but TRL would drop the third column before it packs."""
        if packing:
            dataset = dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset
            dataset = pack_dataset(dataset, args.max_length, args.packing_strategy)
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        """The sum of weights of all rows of a step, in the place of their number of tokens."""
        if super()._get_num_items_in_batch(batch_samples, device) is None:
            return None
        return torch.stack([_counted(batch).sum() for batch in batch_samples]).sum().to(device)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Sum of weight times negative log-likelihood over the sum of weights."""
        inputs = dict(inputs)
        counted = _counted(inputs)
        inputs.pop("weights")
        total = counted.sum() if num_items_in_batch is None else num_items_in_batch
        share = counted / torch.as_tensor(total, device=counted.device).clamp(min=torch.finfo(torch.float32).tiny)

        def weighted(**call: Any) -> Any:
            output = model(**call)
            if getattr(output, "log_probs", None) is not None:
                before = output.log_probs.shape[1] - share.shape[1]  # virtual tokens of prompt tuning have no weight
                output.log_probs = output.log_probs * torch.nn.functional.pad(share, (before, 0)).to(output.log_probs)
            return output

        # TRL divides by a number of tokens that it holds to be 1 or more: the shares are divided by theirs already
        return super().compute_loss(weighted, inputs, return_outputs, num_items_in_batch=1)


def _counted(batch: dict[str, Any]) -> Tensor:
    """Weights of the tokens that are predicted, which are all but the first of a row."""
    return batch["weights"][..., 1:] * (batch["labels"][..., 1:] != IGNORED)
