"""The defaults of every setting (cosmos_jax/config.py) as a ConfigDict that refuses unknown names."""

import ml_collections

from cosmos_jax.config import Config, to_dict


def defaults() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(to_dict(Config()), convert_dict=True)


def set_group(config: ml_collections.ConfigDict, group: str, **settings) -> None:
    """Several settings of one group at once; a name that does not exist is an error."""
    for name, value in settings.items():
        if isinstance(value, dict):
            pairs = isinstance(config[group][name], tuple)  # a table of shares
            value = tuple(value.items()) if pairs else ml_collections.ConfigDict(value)
        config[group][name] = value
