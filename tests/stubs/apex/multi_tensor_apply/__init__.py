"""Apex's applier is an object, whose class says where it is from."""


class MultiTensorApply:
    def __call__(self, *arguments: object) -> None:
        raise NotImplementedError


multi_tensor_applier = MultiTensorApply()
