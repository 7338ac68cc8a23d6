"""CDL: a student with prompts that learns every task from labels and from a larger teacher.

Zhang, Guo, Xiang, "Continual Distillation Learning", arXiv 2407.13911. Teacher and student are the
same method with prompts, the *host* (`cdl.host`), each on its own frozen transformer. In each task
the teacher learns first and is frozen; then the student learns. With the cross-entropy over the
task's classes and the host's own terms L_pool, on the classes C_t of the task,

    loss = (1 - alpha) CE(z, y) + L_pool
           + alpha tau^2 KL( softmax(z_T / tau) || softmax(z_kd / tau) )      alpha 0.5, tau 2

where z are the student's logits, z_T the teacher's, and z_kd those that imitate it. Predictions are
(1 - w) z + w z_kd with w = alpha (`cdl.test_weight`). The four versions of the paper are four
methods (`cdl.form`), and what they add is never reset:

- `kdp` (versions 3 and 4, "D-CDL"): one more token at the end of the sequence, whose output z_kd is
  read from by a head of its own, and in each block but the first three key rows and three value
  rows, the same for all images and tasks. For ViT-S/16 and 100 classes 64,228 more numbers.
- `kd_token` (version 2): the token and its head alone. The baseline that the tables call DeiT is
  the same, so `deit` is another name of it.
- `cdl_prompt` (version 1): no token. In each block where the teacher has prompts, the mean over the
  rows of its prompt for the same image is mapped to prefix rows of the student by a small
  CODA-Prompt; a second head reads the class token too. At test time only the teacher's prompts are
  needed, not its transformer.
- `none`: the host alone, without a teacher.

Baselines, as the authors coded them: `kd`, z_kd = z; `dkd`, the last term is alpha (TCKD + 4 NCKD)
at temperature 4; `fitnets`, `kd` + 0.1 mean square between the teacher's tokens after the last
block and a linear projection of the student's; `reviewkd`, `kd` + 0.2 mean over the student's
blocks of the mean square between the teacher's last blocks and fused ones of the student.

Both hosts choose prompts by the same query, the feature of the student's frozen transformer, so the
keys of both have its width; `cdl.query=own` gives the teacher its own. While the student learns,
the teacher predicts as at test time: it chooses prompts by query, never by task.

Published settings (IRVLUTD/CDL): Adam at 0.001 without decay, along a quarter of a cosine by epoch
(`train.schedule=quarter_cosine`), batch 64 (32 with a ViT-L), teacher and student each 20 epochs
(CIFAR-100) or 35 (ImageNet-R), pixels in [0, 1], ViT-B -> ViT-S and ViT-L -> ViT-B. The hosts are
those of CODA-Prompt's code, which are the defaults here: L2P 30 prompts of 20 rows, 5 chosen, in
block 0; DualPrompt 20 + 6 rows; CODA-Prompt 100 components of 8 rows; key losses as means over the
batch (sums before January 2025). APT merges with 0.3.

What the code does rather than the papers say: the published scripts run on two GPUs and add up what
each has, which doubles the hosts' own terms and the feature losses (ours is one device's); the
terms of the hosts have weight 1; fusion in `reviewkd` has no softmax over its two gates; DKD drops
the weight of TCKD, which is 1.

Where we differ: the authors merge the APT teacher's prompt only after the student has learned, so
that the teacher of the first task predicts without a prompt; ours ends its task first, as the other
hosts do. Their APT head adds a bias. With DualPrompt, their keys of tasks that are not learned yet
can be chosen (see `learners.dualprompt`). Their `cdl_prompt` gives the mapper the host's own pool,
of which it uses only the first M / T components, in all tasks: 10 of 8 rows with CODA-Prompt, which
is the default here; set `cdl.map_components=3`, `cdl.map_length=20` for L2P and 1 and 20 for
DualPrompt. Version 1 also trains teacher and student in turn on every batch, with the prompts that
the teacher chooses in training; ours has two phases, as the later ones. Their token of `kd_token`
stands in front; attention does not depend on the order.

What cannot be verified: the papers' numbers are of one seed, and their body was not at hand, so
that "published" means the code and the tables of the project page. `cdl_prompt` follows code that
is no longer in the repository's history.
"""

import functools

import jax
import jax.numpy as jnp

from qkd_jax.errors import ConfigError
from qkd_jax.learners import apt, coda_prompt, dualprompt, l2p
from qkd_jax.learners.cdl.parts import (
    apply_linear,
    fused_blocks,
    new_fusion,
    new_linear,
    new_mapper,
    start_rows,
    with_mapped,
    with_prompts,
    with_token,
)
from qkd_jax.learners.cdl.settings import FORMS, CdlSettings, Form
from qkd_jax.learners.prompted import (
    PromptHost,
    extract_with,
    feature_of,
    frozen_query,
    prompt_learner,
    query_of,
    relevance,
    with_terms,
)
from qkd_jax.learners.shape import Learner, Teacher, class_columns, register, teacher_settings
from qkd_jax.learners.state import local_labels, valid_task_classes
from qkd_jax.learners.task_heads import class_terms, mask_unseen, stored_head, with_term
from qkd_jax.nn.backbone import Backbone
from qkd_jax.nn.encode import encode, encode_all
from qkd_jax.nn.losses import decoupled_kl, mean_square, softened_kl
from qkd_jax.settings.config import Config
from qkd_jax.settings.sections import BackboneConfig

HOSTS = {host.name: host for host in (l2p.HOST, dualprompt.HOST, coda_prompt.HOST, apt.HOST)}


def teacher_config(config: Config) -> Config | None:
    """The teacher's settings: the host on the backbone of `config.teacher`; None with
    `cdl.form=none`.
    """
    settings = config.cdl
    if settings.form == "none":
        return None
    return teacher_settings(config, settings.host, config.teacher, settings.teacher_rate)


def alone(config: Config) -> Config:
    """The settings of the same student without a teacher."""
    plain = CdlSettings(host=config.cdl.host, form="none")
    return config.replace(cdl=plain, teacher=BackboneConfig())


def teacher_width(config: Config, backbone: Backbone) -> int:
    """E, the width of the teacher's transformer."""
    return config.shapes.teacher_width or backbone.spec.width


def distilled(host: PromptHost, form: Form) -> Learner:
    """The student of a host: a `Learner` with a teacher, on the frozen parts of `LearnerState`.

    What the form trains is `trainable["kd"]`, beside the host's own parts; the stored rows of the
    second head are `memory["kd"]`. Slot features are [class token, token for distillation].
    """

    def init(key, backbone, config):
        trainable, memory = host.init(key, backbone, config)
        key_parts, key_head = jax.random.split(jax.random.fold_in(key, 1))
        kd = new_parts(key_parts, host, form, backbone, config)
        if form.head:
            kd["head"] = host.new_head(key_head, backbone, config)
            size = config.shapes.num_classes
            memory = memory | {
                "kd": jax.tree.map(lambda a: jnp.zeros((size, *a.shape[1:])), kd["head"])
            }
        return {**trainable, "kd": kd}, memory

    def begin(state, key):
        trainable, memory = host.begin(state, key)
        kd = state.trainable["kd"]
        if form.head:
            key = jax.random.fold_in(key, 1)
            kd = {**kd, "head": host.new_head(key, state.backbone, state.config)}
        return {**trainable, "kd": kd}, memory

    def loss(trainable, state, inputs, batch, context):
        settings, kd, teacher = state.config.cdl, trainable["kd"], batch["teacher"]
        query = query_of(state, inputs, batch) if host.has_query else None
        inserts, extra = host.trained(trainable, state, query, context)
        inserts = with_parts(inserts, kd, teacher.get("prompts"), state.backbone.spec.depth)
        if form.tokens == "none":
            features, blocks = read(host, form, state, inputs, inserts), []
        else:
            feature, blocks = read_all(host, state, inputs, inserts)
            features = [feature]
        logits = host.logits(trainable["head"], features[0])
        taught = host.logits(kd["head"], features[-1]) if form.head else logits
        terms = class_terms(state, logits, batch["label"])
        if form.head:
            mixed = class_terms(state, predicted(settings, logits, taught), batch["label"])
            terms = {**terms, "train_accuracy": mixed["train_accuracy"]}
        imitation = imitation_loss(state, form, teacher["logits"], taught, batch["label"])
        terms = {**terms, "loss": (1.0 - settings.alpha) * terms["loss_ce"]}
        terms = with_term(terms, "distillation", settings.alpha, imitation)
        if form.tokens == "last":
            gap = mean_square(teacher["tokens"], apply_linear(kd["projection"], blocks[-1]))
            terms = with_term(terms, "tokens", settings.fitnets_weight, gap)
        elif form.tokens == "all":
            gap = mean_square(teacher["blocks"], fused_blocks(kd["fusion"], blocks))
            terms = with_term(terms, "tokens", settings.reviewkd_weight, gap)
        return with_terms(terms, extra)

    def prompted(state, inputs, query):
        """[B, D], or [B, 2 D] with a token for distillation."""
        means = prompt_means(host, state.teacher, query) if form.mapper else None
        inserts, depth = host.learned(state, query), state.backbone.spec.depth
        inserts = with_parts(inserts, state.trainable["kd"], means, depth)
        return jnp.concatenate(read(host, form, state, inputs, inserts), axis=1)

    def score(state, features):
        width, settings = state.backbone.spec.width, state.config.cdl
        own = features[:, host.first_slot + state.task]
        logits = host.logits(state.memory, own[:, :width])
        if form.head:
            taught = own[:, width : 2 * width] if form.token else own[:, :width]
            logits = predicted(settings, logits, host.logits(state.memory["kd"], taught))
        return mask_unseen(state, logits), relevance(host, state, features)

    def finish(state, sums, key):
        state = host.finish(state, sums, key)
        if not form.head:
            return state
        stored = stored_head(state, state.memory["kd"], state.trainable["kd"]["head"])
        return state.replace(memory={**state.memory, "kd": stored})

    def outputs(state, inputs):
        """What the loss reads of the teacher: "logits" [B, C], and by form its "tokens" [B, N, E]
        after the last block, those of its last L "blocks" [B, L, N, E], or the means of its
        "prompts" [B, K, E].
        """
        teacher = state.teacher
        giver = state if shares_query(state.config) else teacher
        query = frozen_query(giver, inputs) if host.has_query else None
        inserts, found = host.learned(teacher, query), {}
        if form.tokens == "none":
            feature = feature_of(host, teacher, inputs, inserts)
        else:
            feature, blocks = read_all(host, teacher, inputs, inserts)
            found = {"tokens": blocks[-1]}
            if form.tokens == "all":
                found = {"blocks": jnp.stack(blocks[-state.backbone.spec.depth :], axis=1)}
        if form.mapper:
            found = {"prompts": prompt_means(host, teacher, query)}
        return {"logits": host.logits(teacher.memory, feature), **found}

    return prompt_learner(host)._replace(
        name="cdl",
        init=init,
        begin=begin,
        loss=loss,
        finish=finish,
        extract=extract_with(host, prompted),
        score=score,
        predict_with_task=lambda config: None,
        parts=lambda config: 2 if form.token else 1,
        teacher=Teacher(
            teacher_config,
            alone,
            outputs,
            shares_query,
            rate="cdl.teacher_rate",
            check=functools.partial(check_tokens, form),
        ),
    )


def shares_query(config: Config) -> bool:
    """Whether the teacher's queries come from the student's backbone."""
    return config.cdl.query == "student"


def predicted(settings: CdlSettings, logits: jax.Array, taught: jax.Array) -> jax.Array:
    """(1 - w) z + w z_kd."""
    weight = settings.alpha if settings.test_weight < 0 else settings.test_weight
    return (1.0 - weight) * logits + weight * taught


def imitation_loss(state, form, teacher, student, labels):
    """[B]: how far the student's logits [B, M] on the task's classes are from the teacher's
    [B, C].
    """
    settings, valid = state.config.cdl, valid_task_classes(state)
    teacher = jnp.take(teacher, class_columns(state), axis=1, mode="fill", fill_value=0.0)
    if not form.decoupled:
        return softened_kl(teacher, student, valid[None], settings.temperature)
    labels = local_labels(state, labels)
    temperature, weight = settings.dkd_temperature, settings.dkd_others
    return decoupled_kl(teacher, student, labels, valid, temperature, weight)


def new_parts(key, host, form, backbone, config):
    """What a form trains beside the host and the heads.

    Raises:
      ConfigError: the teacher's prompts are no prefixes, which alone are mapped.
    """
    settings, spec, wide = config.cdl, backbone.spec, teacher_width(config, backbone)
    start, parts = settings.kd_start, {}
    if start == "published":
        start = "unit" if form.prompts else "zeros"
    key_token, key_prompts = jax.random.split(key)
    if form.token:
        parts["token"] = start_rows(key_token, (1, spec.width), start)
    if form.prompts:
        shape = (spec.depth - 1, settings.kd_length, spec.width)
        parts["prompts"] = start_rows(key_prompts, shape, start)
    if form.mapper:
        blocks = host.prefix_blocks(config)
        if not blocks:
            raise ConfigError(
                f"{host.name}.form: expected gtripl, whose prompts are prefixes, since "
                "cdl.form=cdl_prompt maps these, found official"
            )
        shape = (blocks, settings.map_components, settings.map_length)
        parts["mapper"] = new_mapper(key, shape, wide, spec.width)
    if form.tokens == "last":
        parts["projection"] = new_linear(key, spec.width, wide)
    if form.tokens == "all":
        parts["fusion"] = new_fusion(key, spec.depth, wide, spec.width)
    return parts


def with_parts(inserts, kd, means, depth):
    """The host's inserts and those of the form, as far as `kd` has them."""
    if "prompts" in kd:
        inserts = with_prompts(inserts, kd["prompts"])
    if "token" in kd:
        inserts = with_token(inserts, kd["token"])
    if "mapper" in kd:
        inserts = with_mapped(inserts, kd["mapper"], means, depth)
    return inserts


def read(host, form, state, inputs, inserts):
    """The features of the host and, with a token for distillation, of that: each [B, D]."""
    if not form.token:
        return [feature_of(host, state, inputs, inserts)]
    rows = (0, -1)
    if host.reads_added(state.config):
        rows = range(-inserts.tokens.shape[-2], 0)
    outputs = encode(state.backbone, inputs, inserts, rows=rows, compute_dtype=dtype_of(state))
    outputs = outputs.astype(jnp.float32)
    return [jnp.mean(outputs[:, :-1], axis=1), outputs[:, -1]]


def read_all(host, state, inputs, inserts):
    """(the host's feature [B, D], all tokens [B, N, D] after each block)."""
    results = encode_all(state.backbone, inputs, inserts, compute_dtype=dtype_of(state))
    *blocks, last = [x.astype(jnp.float32) for x in results[1:]]
    if host.reads_added(state.config):
        return jnp.mean(last[:, -inserts.tokens.shape[-2] :], axis=1), blocks
    return last[:, 0], blocks


def dtype_of(state):
    return jnp.dtype(state.config.backbone.compute_dtype)


def check_tokens(form, student, teacher):
    """Raises ConfigError where a form compares tokens of teacher and student one by one, and they
    cannot be.
    """
    if form.tokens == "none":
        return
    if teacher.num_tokens != student.num_tokens:
        raise ConfigError(
            "teacher.image_size: expected one at which the teacher has as many tokens as the "
            f"student ({student.num_tokens}), which cdl.form=fitnets and reviewkd compare, found "
            f"{teacher.num_tokens}"
        )
    if form.tokens == "all" and teacher.depth < student.depth:
        raise ConfigError(
            f"teacher.name: expected at least {student.depth} blocks, as many as the student has, "
            f"which cdl.form=reviewkd compares, found {teacher.depth}"
        )


def prompt_means(host, teacher, query):
    """[B, K, E]: the mean over the rows of the teacher's prompt for each image, in each of the
    first K blocks; needs no pass through the teacher.
    """
    inserts = host.learned(teacher, query).attention[: host.prefix_blocks(teacher.config)]
    rows = [jnp.concatenate([i.prefix_key, i.prefix_value], axis=-2) for i in inserts]
    means = [jnp.broadcast_to(r.mean(-2), (query.shape[0], r.shape[-1])) for r in rows]
    return jax.lax.stop_gradient(jnp.stack(means, axis=1))


def student_of(config: Config) -> Learner:
    """The learner for the host and the form of these settings."""
    return _student(config.cdl.host, config.cdl.form)


@functools.cache
def _student(name: str, form: str) -> Learner:
    host = HOSTS[name]
    if form != "none":
        return distilled(host, FORMS[form])
    no_teacher = Teacher(teacher_config, alone, outputs=lambda state, inputs: {})
    return prompt_learner(host)._replace(name="cdl", teacher=no_teacher)


LEARNER = register(
    student_of,
    name="cdl",
    # The hosts as in CODA-Prompt's code, on which CDL builds.
    defaults=(
        *("l2p.form=gtripl", "l2p.pool=30", "l2p.length=20", "l2p.start=unit", "l2p.key_weight=1"),
        *("dualprompt.form=gtripl", "dualprompt.general_length=6", "dualprompt.expert_length=20"),
        *("dualprompt.start=unit", "dualprompt.expert_start=random"),
    ),
    reads="image",
    cdl=CdlSettings,
    teacher=BackboneConfig,
    l2p=l2p.L2pSettings,
    dualprompt=dualprompt.DualPromptSettings,
    coda_prompt=coda_prompt.CodaPromptSettings,
    apt=apt.AptSettings,
)
