"""What a latent's mean colour is, for previews: pixels of [-1, 1] are roughly latent @ RGB_FACTORS + RGB_BIAS.

Read off `codec.LinearCodec`, whose first three components are all but flat blocks of colour; a test compares them.
"""

RGB_FACTORS = [[0.121, 0.117, 0.119], [0.117, -0.018, -0.101], [-0.041, 0.111, -0.067]] + [[0.0, 0.0, 0.0]] * 13
RGB_BIAS = [-0.372, -0.368, -0.379]
