"""A trainer that takes its rows in the order of their phases; within a phase they are shuffled and packed as asked.

Records of two phases never share a packed row, and the schedule of the learning rate runs once over all of them.
Import it late.
"""

from typing import Any

import datasets
from torch.utils.data import SequentialSampler

from workbench.finetuning.weighted_trainer import WeightedTrainer


class PhasedTrainer(WeightedTrainer):
    """Rows bring a column `phase` beside `weights`."""

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, *others: Any) -> Any:
        phases = sorted(set(dataset["phase"]))
        places = {phase: [i for i, own in enumerate(dataset["phase"]) if own == phase] for phase in phases}
        rows = dataset.remove_columns("phase")
        parts = []
        for phase in phases:
            part = rows.select(places[phase])
            if args.shuffle_dataset:
                part = part.shuffle(seed=args.seed + phase)  # no two epochs in the same order
            parts.append(super()._prepare_dataset(part, processing_class, args, *others))
        return datasets.concatenate_datasets(parts)

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)
