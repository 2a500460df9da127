"""From a trained model to samples: schedules, guidance, the denoising loop, text decoding."""
