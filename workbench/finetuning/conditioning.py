"""Records under a control text, and records of refusals: what to learn from chains that are wrong.

A wrong chain taught as it is makes a model worse; taught under a text that says so, it tells the model what the right
text asks for (control codes: CTRL, arXiv 1909.05858; by reward: Quark, arXiv 2205.13636; from failures of agents,
arXiv 2402.11651). At the end the model is asked with the control text of the right ones. No loss below zero is needed.
"""

from collections.abc import Sequence
from typing import Any, Literal, get_args

from workbench.synthesis.records import Record, check_record

Place = Literal["system", "answer"]


def condition(records: Sequence[Record], control: str, *, where: Place = "system") -> list[Record]:
    """The same records, each marked as kept, with a control text such as "[right]" or "[wrong]" that goes before them.

    where: "system" puts it at the start of the system turn; ask with `Strategy(system=control)`. "answer" puts it and a
    line break before the answer, given and not learnt; ask with `lm.render(messages) + control + "\\n"`. Records that
    were marked as negative data (`data.negatives`) become records to train on. The field `control` says what was added.

    >>> record = {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "3"}]}
    >>> [turn["content"] for turn in condition([record], "[wrong]")[0]["messages"]]
    ['[wrong]', '1+1?', '3']
    """
    if not isinstance(control, str) or not control.strip():
        raise ValueError(f"control={control!r}: give a short text such as '[right]' or '[wrong]'.")
    if where not in get_args(Place):
        raise ValueError(f"where={where!r} is not known. Choose one of: {', '.join(get_args(Place))}.")
    return [_under(check_record(record, f"record {n}"), control, where) for n, record in enumerate(records, start=1)]


def _under(record: Record, control: str, where: Place) -> Record:
    if record.get("control"):
        raise ValueError(f"The record {record.get('id', '')} has the control text {record['control']!r} already.")
    if "token_weights" in record:
        raise ValueError(
            f"The record {record.get('id', '')} has token_weights, which belong to its old tokens. Condition first, "
            "and weigh then."
        )
    messages: list[dict[str, Any]] = [dict(message) for message in record["messages"]]
    more: dict[str, Any] = {"control": control, "kept": True}
    if where == "answer":
        more["given"] = f"{control}\n"
        messages[-1]["content"] = more["given"] + messages[-1]["content"]
    elif messages[0]["role"] == "system":
        messages[0]["content"] = f"{control}\n{messages[0]['content']}"
    else:
        messages = [{"role": "system", "content": control}, *messages]
    return {**record, **more, "messages": messages}


def refusals(records: Sequence[Record], text: str = "I don't know.") -> list[Record]:
    """The records' questions, each once, answered by `text`: for what a model gets wrong (arXiv 2311.09677).

    Give questions that the model fails on (`data.negatives`), and train on them together with answers that it knows, or
    it learns to refuse everything. Fields that describe the old answer (weights, the mark as negative) are left out.

    >>> record = {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "3"}], "id": "a"}
    >>> refusals([record, record])[0]["messages"][-1]["content"]
    "I don't know."
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'text={text!r}: give the words of the refusal, such as "I don\'t know."')
    made: dict[str, Record] = {}
    for number, record in enumerate(records, start=1):
        messages = check_record(record, f"record {number}")["messages"]
        kept: dict[str, Any] = {name: record[name] for name in ("id", "task", "question") if name in record}
        turns = [*messages[:-1], {"role": "assistant", "content": text}]
        made.setdefault(repr(messages[:-1]), {**kept, "messages": turns, "refusal": True, "kept": True})
    return list(made.values())
