"""Runs on the node of each replica before its engine starts: the model must be there, and whole.

Replaces Ray's own node initialisation, which only downloads models that are not local and costs
another process that imports vLLM.
"""

from __future__ import annotations

from pathlib import Path

from ray.llm._internal.common.callbacks.base import CallbackBase

from actors.serving import packaged_model
from raysys.serving.model_files import check_folder


class LocalModelCheck(CallbackBase):  # type: ignore[misc]
    """Prepares (the packaged model) or checks (any other) the model folder on this node."""

    async def on_before_node_init(self) -> None:
        """Check the folder.

        Raises:
            StorageError, DataError: it is missing or damaged on this node.
        """
        self.ctx.run_init_node = False
        folder = Path(self.llm_config.model_loading_config.model_source)
        if self.kwargs.get("packaged") and not folder.exists():
            packaged_model.prepare(folder)
        check_folder(folder, "Put the model folder on every node", checksums=False)
