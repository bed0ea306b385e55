"""Countries of ISO 3166-1 and the spellings in which sources name them.

A row holds the alpha-2 code, the alpha-3 code and the names; an indented row continues the one above. Names
are written as `customers.normalize.country_code` looks them up: casefolded, without accents, dots or a
leading "the", blanks collapsed.
"""

import re

_TABLE = """\
AD AND andorra; principality of andorra
AE ARE united arab emirates; uae; emirates; الامارات العربية المتحدة
AF AFG afghanistan; islamic republic of afghanistan
AG ATG antigua and barbuda
AI AIA anguilla
AL ALB albania; republic of albania
AM ARM armenia; republic of armenia
AO AGO angola; republic of angola
AQ ATA antarctica
AR ARG argentina; argentine republic
AS ASM american samoa
AT AUT austria; osterreich; oesterreich; republic of austria
AU AUS australia; commonwealth of australia
AW ABW aruba
AX ALA aland islands; aland
AZ AZE azerbaijan; republic of azerbaijan
BA BIH bosnia and herzegovina; bosnia; bosnia herzegovina; bosnia-herzegovina; republic of bosnia and
   herzegovina
BB BRB barbados
BD BGD bangladesh; people's republic of bangladesh
BE BEL belgium; belgique; belgie; belgien; kingdom of belgium
BF BFA burkina faso
BG BGR bulgaria; българия; republic of bulgaria
BH BHR bahrain; kingdom of bahrain
BI BDI burundi; republic of burundi
BJ BEN benin; republic of benin
BL BLM saint barthelemy; st barthelemy; saint barts; st barts
BM BMU bermuda
BN BRN brunei darussalam; brunei
BO BOL bolivia; bolivia, plurinational state of; plurinational state of bolivia
BQ BES bonaire, sint eustatius and saba; caribbean netherlands; bonaire
BR BRA brazil; brasil; federative republic of brazil
BS BHS bahamas; commonwealth of the bahamas
BT BTN bhutan; kingdom of bhutan
BV BVT bouvet island
BW BWA botswana; republic of botswana
BY BLR belarus; беларусь; belorussia; republic of belarus
BZ BLZ belize
CA CAN canada
CC CCK cocos (keeling) islands; cocos islands; keeling islands
CD COD congo, the democratic republic of the; democratic republic of the congo; dr congo; drc;
   congo-kinshasa; congo (kinshasa)
CF CAF central african republic
CG COG congo; republic of the congo; congo-brazzaville; congo (brazzaville)
CH CHE switzerland; schweiz; suisse; svizzera; svizra; swiss confederation
CI CIV cote d'ivoire; ivory coast; cote d ivoire; republic of cote d'ivoire
CK COK cook islands
CL CHL chile; republic of chile
CM CMR cameroon; republic of cameroon
CN CHN china; prc; mainland china; 中国; 中华人民共和国; people's republic of china
CO COL colombia; republic of colombia
CR CRI costa rica; republic of costa rica
CU CUB cuba; republic of cuba
CV CPV cabo verde; cape verde; republic of cabo verde
CW CUW curacao
CX CXR christmas island
CY CYP cyprus; κυπροσ; republic of cyprus
CZ CZE czechia; czech republic; cesko; ceska republika
DE DEU germany; deutschland; bundesrepublik deutschland; brd; allemagne; federal republic of germany
DJ DJI djibouti; republic of djibouti
DK DNK denmark; danmark; kingdom of denmark
DM DMA dominica; commonwealth of dominica
DO DOM dominican republic
DZ DZA algeria; algerie; people's democratic republic of algeria
EC ECU ecuador; republic of ecuador
EE EST estonia; eesti; republic of estonia
EG EGY egypt; مصر; arab republic of egypt
EH ESH western sahara
ER ERI eritrea; state of eritrea
ES ESP spain; espana; kingdom of spain
ET ETH ethiopia; federal democratic republic of ethiopia
FI FIN finland; suomi; republic of finland
FJ FJI fiji; republic of fiji
FK FLK falkland islands (malvinas); falkland islands; falklands; malvinas
FM FSM micronesia, federated states of; micronesia; federated states of micronesia
FO FRO faroe islands
FR FRA france; republique francaise; french republic
GA GAB gabon; gabonese republic
GB GBR united kingdom; uk; great britain; britain; england; scotland; wales; northern ireland; united
   kingdom of great britain; united kingdom of great britain and northern ireland
GD GRD grenada
GE GEO georgia
GF GUF french guiana
GG GGY guernsey
GH GHA ghana; republic of ghana
GI GIB gibraltar
GL GRL greenland
GM GMB gambia; republic of the gambia
GN GIN guinea; republic of guinea
GP GLP guadeloupe
GQ GNQ equatorial guinea; republic of equatorial guinea
GR GRC greece; el; hellas; ελλαδα; hellenic republic
GS SGS south georgia and the south sandwich islands
GT GTM guatemala; republic of guatemala
GU GUM guam
GW GNB guinea-bissau; republic of guinea-bissau
GY GUY guyana; republic of guyana
HK HKG hong kong; hong kong sar; hongkong; 香港; hong kong special administrative region of china
HM HMD heard island and mcdonald islands; heard and mcdonald islands
HN HND honduras; republic of honduras
HR HRV croatia; hrvatska; republic of croatia
HT HTI haiti; republic of haiti
HU HUN hungary; magyarorszag
ID IDN indonesia; republic of indonesia
IE IRL ireland; eire; republic of ireland
IL ISR israel; ישראל; state of israel
IM IMN isle of man
IN IND india; bharat; भारत; republic of india
IO IOT british indian ocean territory
IQ IRQ iraq; republic of iraq
IR IRN iran; iran, islamic republic of; ایران; islamic republic of iran
IS ISL iceland; island; republic of iceland
IT ITA italy; italia; italian republic
JE JEY jersey
JM JAM jamaica
JO JOR jordan; hashemite kingdom of jordan
JP JPN japan; nippon; nihon; 日本
KE KEN kenya; republic of kenya
KG KGZ kyrgyzstan; kyrgyz republic
KH KHM cambodia; kingdom of cambodia
KI KIR kiribati; republic of kiribati
KM COM comoros; union of the comoros
KN KNA saint kitts and nevis; st kitts and nevis; st kitts
KP PRK north korea; korea, democratic people's republic of; dprk; democratic people's republic of korea
KR KOR south korea; korea, republic of; korea; republic of korea; 대한민국; 한국
KW KWT kuwait; state of kuwait
KY CYM cayman islands
KZ KAZ kazakhstan; republic of kazakhstan
LA LAO laos; lao people's democratic republic
LB LBN lebanon; lebanese republic
LC LCA saint lucia; st lucia
LI LIE liechtenstein; principality of liechtenstein
LK LKA sri lanka; democratic socialist republic of sri lanka
LR LBR liberia; republic of liberia
LS LSO lesotho; kingdom of lesotho
LT LTU lithuania; lietuva; republic of lithuania
LU LUX luxembourg; luxemburg; letzebuerg; grand duchy of luxembourg
LV LVA latvia; latvija; republic of latvia
LY LBY libya
MA MAR morocco; maroc; kingdom of morocco
MC MCO monaco; principality of monaco
MD MDA moldova; moldova, republic of; republic of moldova
ME MNE montenegro
MF MAF saint martin (french part); saint martin; st martin
MG MDG madagascar; republic of madagascar
MH MHL marshall islands; republic of the marshall islands
MK MKD north macedonia; macedonia; fyrom; republic of north macedonia
ML MLI mali; republic of mali
MM MMR myanmar; burma; republic of myanmar
MN MNG mongolia
MO MAC macao; macau; macao sar; 澳門; macao special administrative region of china
MP MNP northern mariana islands; commonwealth of the northern mariana islands
MQ MTQ martinique
MR MRT mauritania; islamic republic of mauritania
MS MSR montserrat
MT MLT malta; republic of malta
MU MUS mauritius; republic of mauritius
MV MDV maldives; republic of maldives
MW MWI malawi; republic of malawi
MX MEX mexico; united mexican states
MY MYS malaysia
MZ MOZ mozambique; republic of mozambique
NA NAM namibia; republic of namibia
NC NCL new caledonia
NE NER niger; republic of the niger
NF NFK norfolk island
NG NGA nigeria; federal republic of nigeria
NI NIC nicaragua; republic of nicaragua
NL NLD netherlands; nederland; holland; kingdom of the netherlands
NO NOR norway; norge; noreg; kingdom of norway
NP NPL nepal; federal democratic republic of nepal
NR NRU nauru; republic of nauru
NU NIU niue
NZ NZL new zealand; aotearoa
OM OMN oman; sultanate of oman
PA PAN panama; republic of panama
PE PER peru; republic of peru
PF PYF french polynesia
PG PNG papua new guinea; independent state of papua new guinea
PH PHL philippines; pilipinas; republic of the philippines
PK PAK pakistan; islamic republic of pakistan
PL POL poland; polska; republic of poland
PM SPM saint pierre and miquelon; st pierre and miquelon
PN PCN pitcairn; pitcairn islands
PR PRI puerto rico
PS PSE palestine, state of; palestine; palestinian territories; state of palestine
PT PRT portugal; portuguese republic
PW PLW palau; republic of palau
PY PRY paraguay; republic of paraguay
QA QAT qatar; state of qatar
RE REU reunion
RO ROU romania
RS SRB serbia; srbija; србија; republic of serbia
RU RUS russian federation; russia; россия; россииская федерация; rossiya
RW RWA rwanda; rwandese republic
SA SAU saudi arabia; ksa; السعودية; المملكة العربية السعودية; kingdom of saudi arabia
SB SLB solomon islands
SC SYC seychelles; republic of seychelles
SD SDN sudan; republic of the sudan
SE SWE sweden; sverige; kingdom of sweden
SG SGP singapore; republic of singapore
SH SHN saint helena, ascension and tristan da cunha; saint helena; st helena
SI SVN slovenia; slovenija; republic of slovenia
SJ SJM svalbard and jan mayen; svalbard
SK SVK slovakia; slovensko; slovak republic
SL SLE sierra leone; republic of sierra leone
SM SMR san marino; republic of san marino
SN SEN senegal; republic of senegal
SO SOM somalia; federal republic of somalia
SR SUR suriname; republic of suriname
SS SSD south sudan; republic of south sudan
ST STP sao tome and principe; sao tome; democratic republic of sao tome and principe
SV SLV el salvador; republic of el salvador
SX SXM sint maarten (dutch part); sint maarten; st maarten
SY SYR syria; syrian arab republic
SZ SWZ eswatini; swaziland; kingdom of eswatini
TC TCA turks and caicos islands
TD TCD chad; republic of chad
TF ATF french southern territories
TG TGO togo; togolese republic
TH THA thailand; ประเทศไทย; kingdom of thailand
TJ TJK tajikistan; republic of tajikistan
TK TKL tokelau
TL TLS timor-leste; east timor; democratic republic of timor-leste
TM TKM turkmenistan
TN TUN tunisia; republic of tunisia
TO TON tonga; kingdom of tonga
TR TUR turkiye; turkey; republic of turkiye
TT TTO trinidad and tobago; republic of trinidad and tobago
TV TUV tuvalu
TW TWN taiwan; taiwan, province of china; republic of china; 台灣; 臺灣
TZ TZA tanzania; tanzania, united republic of; united republic of tanzania
UA UKR ukraine; украіна; ukraina
UG UGA uganda; republic of uganda
UM UMI united states minor outlying islands
US USA united states; united states of america; america; estados unidos
UY URY uruguay; eastern republic of uruguay
UZ UZB uzbekistan; republic of uzbekistan
VA VAT holy see (vatican city state); vatican; vatican city; holy see; vatican city state
VC VCT saint vincent and the grenadines; st vincent and the grenadines; st vincent
VE VEN venezuela; venezuela, bolivarian republic of; bolivarian republic of venezuela
VG VGB virgin islands, british; british virgin islands
VI VIR virgin islands, us; us virgin islands; virgin islands of the united states
VN VNM vietnam; viet nam; socialist republic of viet nam
VU VUT vanuatu; republic of vanuatu
WF WLF wallis and futuna
WS WSM samoa; independent state of samoa
YE YEM yemen; republic of yemen
YT MYT mayotte
ZA ZAF south africa; sudafrika; suid-afrika; republic of south africa
ZM ZMB zambia; republic of zambia
ZW ZWE zimbabwe; republic of zimbabwe
"""


def _spellings(row: str) -> dict[str, str]:
    alpha2, alpha3, names = " ".join(row.split()).split(" ", 2)
    return dict.fromkeys([alpha2.casefold(), alpha3.casefold(), *names.split("; ")], alpha2)


_ROWS = re.split(r"\n(?! )", _TABLE.strip())

ALPHA2: frozenset[str] = frozenset(row[:2] for row in _ROWS)
"""Every alpha-2 code that ISO 3166-1 assigns."""

CODE_OF: dict[str, str] = {spelling: code for row in _ROWS for spelling, code in _spellings(row).items()}
"""Alpha-2 code by normalised spelling: either code or any name."""

NAME_OF: dict[str, str] = {row[:2]: " ".join(row.split()).split(" ", 2)[2].split("; ")[0] for row in _ROWS}
"""A name by alpha-2 code, casefolded."""
