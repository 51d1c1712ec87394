"""What all trainer tests run under."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="package")
def _one_compute_thread():
    """Run torch's operators on one thread: at these sizes a second one only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Bugs that are known: part of a test's id, and what is wrong. An entry whose test passes is an error (strict).
_KNOWN_BUGS = {
    "test_training_goes_on[on_pre_optimizer_step": "an unused clip coefficient reaches the next gradients",
    "test_step_skipped_after": "an unused clip coefficient reaches the next gradients",
    "test_backward_after_clipping": "the clip coefficient reaches resident gradients of a later backward",
    "test_gradients_edited_by_hand[between_micro_batches-replaced-True": "sums ignore a replaced p.grad",
    "test_gradients_edited_by_hand[before_clipping-replaced-True": "the norm ignores a replaced p.grad",
    "test_gradients_replaced_after_one_backward": "the norm ignores a replaced p.grad",
    "test_penalty_on_the_parameters_themselves": "gradients that reach p.grad past the units are mixed up",
    "test_gradients_kept_over_steps_are_refused": "step() drops streamed gradients but keeps resident ones",
    "test_group_added_after_preparation": "groups added after preparation are never updated",
    "test_fp32_weights_load_exactly_into_split_masters": "nested load hooks end the load too early",
    "test_two_models_in_one_accelerator": "clip_grad_norm_ asks the first engine, not the parameters' own",
    "test_optimizer_classes": "optimizer_cls_and_kwargs is not checked at construction",
    "test_harmless_optimizer_options_are_taken": "SlideAdamW is given options of AdamW that are off",
    "test_resident_parameter_unfrozen": "requires_grad of resident parameters is not checked",
    "test_data_replaced_after_preparation[lm_head": "the memory of resident parameters is not checked",
    "test_parameter_replaced_after_preparation": "the old parameter silently comes back",
    "test_hooks_on_streamed_parameters": "hooks on streamed parameters never run",
    "test_pickling_is_refused[model]": "the model's hooks fail to pickle before a layer can refuse",
    "test_state_dict_waits_for_updates[model.layers.3": "layers have no hook that waits for updates",
    "test_deepcopy_waits_for_updates": "deepcopy does not wait for updates",
    "test_trainers_of_other_precision": "precision is read from Accelerate's shared state at prepare time",
    "test_save_pretrained_on_the_live_model[('bf16_from_fp32'": "save_pretrained writes bf16 halves only",
}


def pytest_collection_modifyitems(items):
    for item in items:
        for part, reason in _KNOWN_BUGS.items():
            if part in item.nodeid:
                item.add_marker(pytest.mark.xfail(strict=True, reason=reason))
