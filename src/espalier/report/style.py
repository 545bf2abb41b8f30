"""The look of a page: one column, one font, light and dark."""

STYLE = """
:root{--ink:#1c2024;--soft:#5c656e;--line:#d9dee3;--page:#fff;--card:#f6f7f9;--link:#0b5cad;--bad:#a3271c}
@media (prefers-color-scheme:dark){
:root{--ink:#e3e6e9;--soft:#9aa4ae;--line:#363c43;--page:#16191c;--card:#1e2226;--link:#74b3f0;--bad:#f08a7d}
.plot .scatterlayer,.plot .legend .layers{filter:brightness(1.45)}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",sans-serif}
main{max-width:1100px;margin:0 auto;padding:2rem 1.25rem 4rem}
h1{font-size:1.7rem;margin:0 0 1rem}
h2{font-size:1.35rem;margin:3rem 0 .2rem;padding-top:1rem;border-top:1px solid var(--line)}
article:first-of-type h2{margin-top:1rem}
h3{font-size:1.1rem;margin:2.2rem 0 .6rem}
h4{font-size:.95rem;margin:0 0 .3rem}
.subtitle,figcaption,.note{color:var(--soft)}
.subtitle{margin:0}
figcaption,.note{font-size:.9rem}
figcaption{max-width:70ch;margin-top:.4rem}
a{color:var(--link)}
ul{padding-left:1.2rem;margin:.6rem 0}
.verdicts{font-weight:600}
.failures{color:var(--bad)}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums;margin:.6rem 0}
th,td{text-align:left;vertical-align:top;padding:.35rem .9rem .35rem 0;border-bottom:1px solid var(--line)}
thead th{color:var(--soft);font-weight:600}
.numbers td,.numbers th{white-space:nowrap}
details{margin:.6rem 0}
summary{cursor:pointer;color:var(--link)}
figure{margin:1rem 0 1.8rem}
.plot .plotly-graph-div{min-height:360px}
.plot svg text{fill:var(--ink)!important;font-family:inherit!important}
.pictures th,.pictures td{border:0;padding:.15rem .7rem .15rem 0;vertical-align:middle}
.pictures tbody th{font-weight:400;white-space:nowrap}
.panels{display:flex;gap:4px}
img{display:block;image-rendering:pixelated;background:var(--card);border:1px solid var(--line)}
.scale{display:flex;align-items:center;gap:.5rem;font-size:.8rem;color:var(--soft);margin:.3rem 0}
.scale i{display:inline-block;width:140px;height:9px;border-radius:2px}
.photograph{display:flex;gap:.8rem;align-items:center;margin-bottom:.6rem}
"""
