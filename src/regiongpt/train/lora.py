"""Low-rank adapters on the language model: put in before stage 2, merged into its weights after it.

A finished checkpoint so has the layers of any other, and loads wherever others do.
"""

from collections import Counter
from typing import Any

from torch import nn

from regiongpt.errors import ConfigError
from regiongpt.train.recipe import LoraConfig


def add_adapters(language_model: nn.Module, config: LoraConfig) -> None:
    """Put adapters beside linear layers of the language model, in place; they alone require gradients afterwards.

    Raises:
        ConfigError: peft is not installed, or a target is no linear layer of the model.
    """
    try:
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
    except ImportError as error:
        raise ConfigError("lora: expected the library peft, found none; run: pip install '.[train]'") from error
    linear = {name.rpartition(".")[2] for name, each in language_model.named_modules() if isinstance(each, nn.Linear)}
    wrong = [name for name in config.targets if name not in linear]
    if wrong:
        raise ConfigError(
            f"lora.targets: expected names of the language model's linear layers, {', '.join(sorted(linear))}, got "
            f"'{wrong[0]}'"
        )
    adapters = PeftConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=list(config.targets) or "all-linear",
    )
    language_model.requires_grad_(False)
    inject_adapter_in_model(adapters, language_model)
    for name, parameter in language_model.named_parameters():
        parameter.requires_grad_("lora_" in name)


def choose_learners(stage: str, model: Any, config: LoraConfig) -> bool:
    """Choose what learns: refinement and connector always, the language model or adapters on it in ``stage2``.

    Returns:
        Whether there are adapters, to be merged when the stage is done.
    """
    model.language_model.requires_grad_(stage == "stage2")
    if stage != "stage2" or not config.rank:
        return False
    add_adapters(model.language_model, config)
    return True


def merge_adapters(language_model: Any) -> None:
    """Add the adapters to the weights beside them, and take them out.

    A head that shares its weight with the word embeddings gets a weight of its own: adding to the shared one would
    change the embeddings too.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [(name, each) for name, each in language_model.named_modules() if isinstance(each, BaseTunerLayer)]
    uses = Counter(id(each) for _, each in language_model.named_parameters(remove_duplicate=False))
    for name, layer in adapted:
        base: Any = layer.get_base_layer()
        if uses[id(base.weight)] > 1:
            base.weight = nn.Parameter(base.weight.detach().clone())
            language_model.config.tie_word_embeddings = False
        layer.merge()
        parent, _, child = name.rpartition(".")
        setattr(language_model.get_submodule(parent), child, base)
    # What peft notes on the model would be taken for adapters that are still there.
    for note in ("peft_config", "_hf_peft_config_loaded"):
        if note in vars(language_model):
            delattr(language_model, note)
