"""CM-IBQ: cross-modal information-bottleneck quantization of LLaVA, weights and activations with learned widths.

How the parts meet, as a training does it:

    sites       = find_sites(model)                              sites.py      what is quantized
    seen        = observe(model, sites, batches)                 start.py      calibration, the model still dense
    cmibq       = wrap(model, Settings(...), seen)               wrap.py       QuantLinears in place, model.cmibq
    optimizer   = AdamW(parameter_groups(model, lr=2e-5))        wrap.py

    before stage 1
        with cmibq.measuring(): forward and backward passes of the model at 8 bits, no steps
        kind.begin(...) for both kinds                           widths.py     logits of a softened knapsack
    every micro-batch of stage 1
        output  = model(**batch)                                 a hook calls cmibq.distribute() first
        loss    = output.loss + sum(cmibq.penalty().values())    bits.py, rate.py; backward fills importance.py
    every optimizer step, in all processes
        log(cmibq.metrics()) before zero_grad; cmibq.advance(step / steps)

    once cmibq.learned is 1, before the last part of stage 1
        with cmibq.measuring(): forward and backward passes of the model as it is by now, no steps
        cmibq.harden()                                           knapsack.py   widths chosen for good
    stage 2
        wrap(model, settings, None); model.load_state_dict(...)  widths come with the state
        loss    = NLL + 0.3 Alignment(...)(pooled(projector tokens), pooled(teacher), text_keys(...)).loss + penalty
        LoRA merged: no bit changes                              adapters.py   the sum with an adapter is quantized
    export
        quantized_weights(model)                                 packed/       bit-exact with the forward pass
        cmibq.activation_grids()                                 static.py     grids that packed Linears hold
        bit_map(model)

stages.py does what comes before and after the training, student.py and trainer.py what is between, save.py the export
and what is checked of it, told.py the report; recipe.py has the options. The verb is mico/qat/cmibq_job.py.

levels.py is the arithmetic of all quantizers, quantizer.py their modules; allocator.py and bits.py make widths from
what importance.py measures; widths.py keeps the widths of activations, and those of weights, together.

Widths of weights belong to runs of 128 columns that all rows share, as in the packed form (mico/packed/quantized.py),
with a scale a row and run. A packed weight has no widths by rows; by columns nothing needs to be added to the format,
its kernels serve it as it is, and what an error costs varies with the input channel far more than with the row.
"""
