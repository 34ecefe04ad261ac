"""The two colour maps of heatmaps, as tables: a picture needs no plotting library.

``plasma`` (sequential, light means more; by Smith and van der Walt, CC0) and ``RdBu_r`` (diverging; by Cynthia Brewer,
colorbrewer2.org, Apache-2.0), both readable for the colour-blind. `tests/unit/test_render.py` holds them equal to
matplotlib's.
"""

import base64
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

# 255 colours: an odd number, so that zero has a colour of its own in the middle of a diverging map.
_COLOURS = 255
_BASE85 = {
    "positive": (
        "4G4!22Z$2~i53Tn83v3S28|sCjvxk)A_kBo29YKOkthX{Dg~1)1(YrYl`jRBF$I@11(!7hm^TEOI0TwH1e!bqn?3}bKLngX1f4?zo<swlM"
        "gyNn1D{C)pi2XxOah@!0-{g?qEP~)Qv#z^0;E;}q*wu@SplV60i|34rd|Q2U;(CK0H<RBr(^)9W&o#W0H|pIsA>SHYyhZk0H|*OsBr+Oas"
        "jAx0jPBWsCNOVcmb$-0;qcesC@&degmk01gL=or-KEjgaxOD2BwDxricipiV3BQ3Z;z;rH%}wj}4@e4x^F}qm&S$l@Xzq6QP(CpqUk)nii"
        "j&7oMFMot_z;pc<T^8=ImXnxh_?r5~B5Aeg5im#89^sw0)FB$TWsl&vR|t|*eQDUq=%kg_X}vn-CZE{(M>jJ7a~w=s&iGKsn~h`Th1yfuf"
        "tH-^4Ag}*t3z&eA$JA%SIfx|t3#6Ew;Kz_zSeaAw4$U}R{M0(0addx?7%t?36N_Ngmb<a$6&`opEPIA&uann(8)KYNOQ*YH&Zq`+8*H&!U"
        "S8Lf=YT8<A+FNPcTxi@~XWd?A-d|<jVPxN8W8h<B;bdasWntoGVB=_C<Y`{zYF*`PUFK|D=Wbi)Z(8VZS?O_D>2g=<bXV(jR_k_E>~~b{c"
        "~k9rQto?E?|f13eo*j#Pw;?F@qtb8gG};-OY?<G^M^|Gh)MK`NcD?H^^8XLjYam4ME8(H_mM;QlS25ELHLzG`IkTWm_GTMKKh$I`kXxao;"
        "&-WI{TqH`=U7fqd5GfH~gkH{HQhjsWknoGySYH{jM_ouQC0xF#WPG{j@LrwJ!d*E&jMH{<<vwyDR>^D*nDI{=g~y!YTd3DE-AJ{l+K#$S3"
        "{ECjHAM{LLl&&L#ZNCH&GQ`_m-*)g=4ZB>LDS`r0J<+$8zkCHUVZ_~9k@;wAUwCHCef_UI<{=_d8-C-m(n^X@0}@F()}C-L+q@%1I}_ayN"
        "7Ap"
    ),
    "signed": (
        "1u$U-GGqrdX9zZG2{~;GJ8%p=a}7Us4ncVjLwpcLe-TH45=w*<OotRsiWX3f7gCTIRFfH2mKs=@8(W+lU7sCaq8?$TA7iK?Wve1*ts`lzB"
        "x|lFY_BJ7uqbe`Dsr+bbF(dVv@UnGFL|~xd$%%tw=;gYHGsJ`g1R?@yE%otI)}YGiM~CGzdnq>KaRjbkikNd!bFq9N0r1%m&Hw)#!#EbQ="
        "Q3HpUPRG%Uz?)V5QAtr_N@n&uOdBY^~96uhMd{({;1dc(v7hx7L5T*Mhs)g}vH{zuSw!+>XQDk;UGW#^095-<iqao66yy%i*BR;-k*vrO)"
        "K3(B!Jo<*n1^uhizU)#tR<=(pJDx!LKw+UmaB>%raY!`|%1-|fiY?aSis&ExOT<nYqv@YCk-)#vfn=keI+@!9F|+v@V%>hj*}^55+9;q3F"
        "`?epaB^X2aJ=kN6B@bv2O_3QEV?eg{R^Y!ra_VM)g^Y!-h_V)Jn_xJbr_xAPo_4D}j@%Z!a`0?)e@a*~T>iO>I`R(TU?Bx3E;`-{~`sv>K"
        "=-vC~+xz9&`{dXA<JJ4()BNGl{NT_0-_88q%>CWU{oBa>+Qt0X!~E62{L{Vr(YyQ4xckku`pdHV$*}szt@*^N`NF69z@_-UqWHX@_qv_;x"
        "SIF2m-e%i_OX)ouaEVujP<LE^{I#Sr-byRg7cz(@t=M0oO|z@dG42Y?UZ%vk#p*gap{b2=!tFThim49Y2<-s<9=k~d}85wVBmIM-*jBvaa"
        "!DNSleq>+G$kTW>VK<P}X5h)m}`~TT9YdNzqkE&r(OuP({p5M9WG;%11%SL_o(uKgB;i#5_F0IXl5NIlwbGzA!hvE;YL=G`c7<xg{~TA~3"
        "ceF0>sjvl=Y17%Q$9DytSMs1+%t6e*$;D4!B2oDnFQ5GR%oCzB2)kPRk{3?+&SC5H+mg$X2r2_t_9BYX!Uc?KeO1tD_;A#ejAZ2}-_0Uu`"
        "o9{"
    ),
}


@cache
def colours(weighting: Literal["positive", "signed"]) -> NDArray[np.uint8]:
    """``(255, 3)`` RGB, from the lowest value of a heatmap of this weighting to the highest; read-only."""
    return np.frombuffer(base64.b85decode(_BASE85[weighting]), np.uint8).reshape(_COLOURS, 3)
