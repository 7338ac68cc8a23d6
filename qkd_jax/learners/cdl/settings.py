"""The settings of continual distillation, and what each of its forms is made of."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from qkd_jax.settings.ranges import Conflicts, setting


class Form(NamedTuple):
    """What a student has beside its host.

    Attributes:
      token: a token for distillation at the end of the sequence.
      prompts: prefixes in all blocks but the first, for all images and tasks.
      head: a second head, which learns from the teacher.
      mapper: prefixes that are mapped from the teacher's prompts for the same image.
      tokens: how many of the teacher's last blocks are compared with the student's, token by token:
        "none", the "last" one, or as many as the student has ("all").
      decoupled: the loss is `losses.decoupled_kl`, and not `losses.softened_kl`.
    """

    token: bool = False
    prompts: bool = False
    head: bool = False
    mapper: bool = False
    tokens: Literal["none", "last", "all"] = "none"
    decoupled: bool = False


KD_TOKEN = Form(token=True, head=True)
FORMS = {
    "kdp": Form(token=True, prompts=True, head=True),
    "kd_token": KD_TOKEN,
    "deit": KD_TOKEN,
    "cdl_prompt": Form(head=True, mapper=True),
    "kd": Form(),
    "dkd": Form(decoupled=True),
    "fitnets": Form(tokens="last"),
    "reviewkd": Form(tokens="all"),
}


@dataclass(frozen=True)
class CdlSettings:
    """Continual distillation (arXiv 2407.13911): the host, and how it learns from a teacher.

    `form`: `kdp` (versions 3 and 4 of the paper), `kd_token` (version 2), `cdl_prompt` (version 1),
    `none` (the host without a teacher), or one of the baselines `kd`, `dkd`, `fitnets`, `reviewkd`
    and `deit`, which is `kd_token` under the name that it has in the papers' tables.
    """

    host: Literal["l2p", "dualprompt", "coda_prompt", "apt"] = "coda_prompt"
    form: Literal[
        "kdp", "kd_token", "cdl_prompt", "none", "kd", "dkd", "fitnets", "reviewkd", "deit"
    ] = "kdp"
    # Whose backbone gives the teacher's queries.
    query: Literal["student", "own"] = "student"
    alpha: float = setting(0.5, low=0, high=1)  # weight of the teacher, against the labels
    # Weight of the second head in predictions; -1 = alpha.
    test_weight: float = setting(-1.0, low=-1, high=1)
    temperature: float = setting(2.0, above=0)  # tau; not of `dkd`
    # Rows of the prompts for distillation in each block, half for keys and half for values.
    kd_length: int = setting(6, low=2)
    # Where token and prompts start: U(0, 0.01), U(0, 1), U(-1, 1), or at zero; `published` is
    # U(0, 1) for `kdp` and zero for `kd_token`.
    kd_start: Literal["published", "small", "unit", "signed", "zeros"] = "published"
    teacher_rate: float = setting(0.0, low=0, zero="as train.learning_rate", of_steps=True)
    dkd_temperature: float = setting(4.0, above=0)
    dkd_others: float = setting(4.0, low=0)  # weight of the classes other than the label
    fitnets_weight: float = setting(0.1, low=0)
    reviewkd_weight: float = setting(0.2, low=0)
    # `cdl_prompt`: components of the mapper in each block, and the rows of a mapped prompt.
    map_components: int = setting(10, low=1)
    map_length: int = setting(8, low=2)

    def conflicts(self) -> Conflicts:
        if -1 < self.test_weight < 0:
            yield "test_weight", "-1 (as cdl.alpha), or 0 to 1"
        for name in ("kd_length", "map_length"):
            if getattr(self, name) % 2:
                yield name, "an even number: half for keys, half for values"
        if self.form == "cdl_prompt" and self.host == "apt":
            yield "host", "l2p, dualprompt or coda_prompt, whose prefixes cdl.form=cdl_prompt maps"
        if self.form == "cdl_prompt" and self.query == "own":
            yield "query", "student, since cdl.form=cdl_prompt runs no teacher at test time"
