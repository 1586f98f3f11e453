"""The main job: train a recurrent net on real data with several backward passes and compare them."""
