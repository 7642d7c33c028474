"""The people that nothing in the small set is trained on.

Recipes are chosen, and trainings stopped, on validation people; test people are measured once, at the end. Of GRID's
speaker s1, who is most of the corpus, sentences are held out.
"""

from __future__ import annotations

HELD_OUT: dict[str, dict[str, list[str]]] = {
    "validation": {
        "identities": """
            grid_s2 fi_50gokPvvMs8 fi_A3StIKMjn4k fi_opEoJBrcmbI fi_Q2AI4XpApFs fi_vr5FWHUkYRM
            vox_104 vox_796100172 hdtf_av2av_12 person_3 person_l2 talking_b
        """.split(),
        "grid_s1": """
            pwad5a lwbl7s lrar2p bbbs4n lwie7a lrwz3s bgan7a prii9a brwa2n bbaf5a
            pgiq4p bwan1a sbim9s pwaq1s pric4p bgwo4p bwbhzp lgwazp swwc7a srihzn
        """.split(),
    },
    "test": {
        "identities": """
            grid_s31 WDA_AlexandriaOcasioCortez portrait_hevc_1080x1920 fi_jmbAPNTJ3Vk fi_9mM_0vrO3wc fi_F0_EI_X5JVk
            fi_JBdLI6AhJrw fi_BWAEpai6FK0 fi_1DCnIad1Y0w hdtf_av2av_11 person_5 person_l8
        """.split(),
        "grid_s1": """
            pgbk8p swib5a sgwj5s swwv6n bgbh4n sgbj1s pgby6p bwwh4p lgif3a bbie8n
            srah6p prwkzp sriu1a bbir9a bwbt6n lwwf7s pwwy5a srah5s sgwp8n lrak6n
            pgwe7s lrbr4n lbwe5s lrwl4n lwbf3s bwit1a pbib7s lray7a swwp4p lgal8n
            lwbl9a lbbq8n lrak8p lgis1a bwigzn sgwd1s sbba8n pgay2p lrwl6p pgby5s
        """.split(),
    },
}
# As identities of a cache
VALIDATION = ("grid_s1_validation", *HELD_OUT["validation"]["identities"])
