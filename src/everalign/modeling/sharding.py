"""Shard a policy's base model with FSDP2: each process keeps a part of every layer, and gathers a layer to compute it.

Only frozen weights of decoder layers are sharded. Adapters, embeddings, norms behind the last layer and the head stay
whole in every process: what learns is small, DDP sums its gradients, and methods, checkpoints and memory see no
difference.

Gathering takes all processes. In a training step they make the same number of passes. Elsewhere each has work of its
own (`everalign.distributed.share`, `on_main`), and one that is done goes along with the passes of the others.
"""

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from everalign.distributed import apart, follow_with, follows, machine_groups
from everalign.errors import EveralignError, InputError
from everalign.modeling import lora
from everalign.modeling.policy import Policy
from everalign.modeling.shrinking import layer_list

# What a process does next: nothing more, a pass without gradients, or one with a backward pass right behind it.
_DONE, _READS, _LEARNS = range(3)


def shard(policy: Policy, device: torch.device) -> int:
    """Shard the base model of a policy between the processes of a machine, or between all where it runs only one.

    Args:
        policy: on the CPU, the same in all processes; changed in place.
        device: where it is to compute.

    Returns:
        How many processes share it.

    Raises:
        InputError: the model cannot be sharded.
    """
    model = policy.language_model
    layers = _layers(model, policy)
    mesh_group, objects = machine_groups()
    mesh = DeviceMesh.from_group(mesh_group, device.type)
    adapters = {part for name, part in policy.named_parameters() if ".lora_" in name}
    for layer in layers:
        # Each at once, so that no more than one is whole on a GPU.
        fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=adapters)
    decoder, inside = model.base_model, {part for layer in layers for part in layer.parameters()}
    # The root shards nothing; it lets the next layer be gathered while one is computed.
    fully_shard(decoder, mesh=mesh, ignored_params={*decoder.parameters()} - inside | adapters)
    # What is not sharded goes to the device; `Module.to` does not take sharded parameters.
    for part in policy.parameters():
        if not isinstance(part, DTensor):
            part.data = part.data.to(device)
    for module in policy.modules():
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = buffer.to(device)
    for adapted in lora.layers(policy.peft).values():
        adapted.keeps_weight = False
    policy.sharded = True
    companion = _Companion(policy, layers, objects)
    _check_order(companion, layers, type(model).__name__)
    follow_with(companion.follow)
    return mesh.size()


def _layers(model: Any, policy: Policy) -> list[nn.Module]:
    """Return the layers to shard."""
    kind = type(model).__name__
    if getattr(model, "hf_quantizer", None) is not None:
        raise InputError(f"fsdp: the weights of this {kind} are quantised: leave fsdp out, they are small already")
    if policy.prompts is not None:
        raise InputError("fsdp: the method l2p reads prompts one by one in every process: leave fsdp out")
    layers = layer_list(model)
    if layers is None:
        raise InputError(f"fsdp: the layers of this {kind} are not known, so it cannot be sharded: leave fsdp out")
    if policy.head.lengths.stretch is not None:
        raise InputError(f"fsdp: positions of this {kind} stretch with the longest row, which takes passes of its own")
    seen: dict[int, str] = {}
    for number, layer in enumerate(layers):
        for name, part in layer.named_parameters():
            other = seen.setdefault(id(part), f"layer {number}")
            if other != f"layer {number}":
                raise InputError(f"fsdp: {name} of layer {number} is {other}'s too: this {kind} cannot be sharded")
    inside = {id(module) for layer in layers for module in layer.modules()}
    for name, module in model.named_modules():
        if id(module) not in inside and any(id(part) in seen for part in module.parameters(recurse=False)):
            raise InputError(f"fsdp: {name} shares weights with a layer: this {kind} cannot be sharded")
    return layers


def _check_order(companion: "_Companion", layers: list[nn.Module], kind: str) -> None:
    """Refuse a model that does not compute each layer once, in turn: the processes would wait for one another."""
    called: list[int] = []
    hooks = [
        layer.register_forward_pre_hook(lambda *_, number=number: called.append(number))
        for number, layer in enumerate(layers)
    ]
    companion.go_along(_READS)
    for hook in hooks:
        hook.remove()
    if called != list(range(len(layers))):
        raise InputError(f"fsdp: this {kind} does not compute its layers one after the other: leave fsdp out")


class _Companion:
    """Keeps processes in step that gather layers together while each has passes of its own.

    Args:
        policy: the sharded one.
        layers: its layers, in order.
        group: of the processes that share them, for what is exchanged on the CPU.
    """

    def __init__(self, policy: Policy, layers: list[nn.Module], group: Any) -> None:
        self._policy, self._group, self._inside = weakref.ref(policy), group, False
        layers[0].register_forward_pre_hook(self._begins, prepend=True)
        layers[-1].register_forward_hook(self._ends)

    def _begins(self, *_: Any) -> None:
        if apart():
            if not follows(self.follow):
                raise EveralignError("a later learner has taken over the processes: use that one")
            self._announce(_LEARNS if torch.is_grad_enabled() else _READS)
        self._inside = True

    def _ends(self, *_: Any) -> None:
        self._inside = False

    def _announce(self, wanted: int) -> int:
        """Tell the others what this process does next; returns the most that one of them does."""
        said = torch.tensor(wanted)
        dist.all_reduce(said, op=dist.ReduceOp.MAX, group=self._group)
        return int(said)

    def follow(self, error: Exception | None) -> None:
        """Go along with the passes of other processes until all are done.

        Args:
            error: with which this process's own work has ended.
        """
        if error is not None and self._inside:
            # The others wait in the middle of a pass that nobody can finish.
            raise error
        while wanted := self._announce(_DONE):
            self.go_along(wanted)

    def go_along(self, wanted: int) -> None:
        """Make a pass of one token, for nothing but its exchanges."""
        policy = self._policy()
        if policy is None:
            raise EveralignError("the sharded model is gone while other processes compute with it")
        token = torch.zeros(1, 1, dtype=torch.long, device=policy.language_model.device)
        with torch.set_grad_enabled(wanted == _LEARNS):
            states = policy.response_states({"input_ids": token, "predictors": token[0]})
            if wanted == _LEARNS:
                learned = [part for part in policy.parameters() if part.requires_grad]
                torch.autograd.grad(states.sum(), learned, allow_unused=True)


def data_parallel(policy: nn.Module, device: torch.device) -> DistributedDataParallel:
    """Return a sharded policy under DDP, which sums the gradients of what learns and leaves the shards alone."""
    names = [name for name, part in policy.named_parameters() if isinstance(part, DTensor)]
    # torch has no typed way to say it.
    ignore: Any = DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(policy, names)
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(policy, device_ids=devices, forward_sync_buffers=False)
