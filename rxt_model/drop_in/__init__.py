"""The drop-in for the upstream library `rxlm`: its models, computed here (`rxt_kernels.integrations.rxlm` is the door).

* `recognition` finds upstream's components in a module, by class names and nothing else of upstream's;
* `structure` builds the same component of this package on the meta device, by the rules of checkpoints;
* `binding` gives it upstream's own parameters;
* `accelerated` has upstream's arguments and results around it, and stands in the place of upstream's methods by `shadow`;
* `comparison` asks both the same before that happens; `report` says what came of it;
* `conversation` and `generation` answer for complete models and language models (`language_model`).
"""

from rxt_model.drop_in.acceleration import accelerate, restore
from rxt_model.drop_in.report import NothingAcceleratedError, Replaced, Report, Skipped

__all__ = ["NothingAcceleratedError", "Replaced", "Report", "Skipped", "accelerate", "restore"]
