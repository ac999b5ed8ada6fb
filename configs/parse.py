"""The argument of a config file: `FILE:key=value,key=value`."""

from moex.config.base import ConfigError, nearest


def parse_arg(arg: str, **choices) -> dict:
    """The value of every key; the first choice where the argument has none.

    Args:
      arg: such as "router=topp,chain=2"; may be empty.
      **choices: for each key the allowed words, or a range of allowed ints.

    Raises:
      ConfigError: for an unknown key, a bad value or a key given twice.
    """
    values = {key: allowed[0] for key, allowed in choices.items()}
    given = set()
    for part in filter(None, arg.split(",")):
        key, equals, text = part.partition("=")
        if key not in choices or not equals:
            raise ConfigError(
                f"config argument {part!r}: must be KEY=VALUE with a key among "
                f"{', '.join(choices)}.{nearest(key, choices)}"
            )
        if key in given:
            raise ConfigError(f"config argument {part!r}: {key} is given twice.")
        given.add(key)
        values[key] = _value(part, text, choices[key])
    return values


def _value(part, text, allowed):
    if isinstance(allowed, range):
        if text.isdecimal() and int(text) in allowed:
            return int(text)
        raise ConfigError(
            f"config argument {part!r}: must be an integer from {allowed[0]} to "
            f"{allowed[-1]}."
        )
    if text not in allowed:
        raise ConfigError(
            f"config argument {part!r}: must be one of {', '.join(allowed)}."
            f"{nearest(text, allowed)}"
        )
    return text
