"""The values that synthetic facts can take: names, cities, jobs, ... (about 1,000 in all).

They are plain lists so that anybody can see what the demo model can know. A name can be the user's, a sister's or
a pet's; a city can be where somebody lives or was born: the same value means different things in different facts,
so a model cannot answer from the value's kind alone.
"""
# ruff: noqa: SIM905  (long lists read better as text)

from __future__ import annotations

__all__ = ["VALUES"]

_MEN = """
Peter Paul Lukas Noah Liam Jack Harry Oscar Leo Max Felix Hugo Arthur Henry George
William James Thomas Daniel David Michael Robert John Joseph Samuel Benjamin Adam Nathan Simon Martin Victor Walter
Frank Albert Edward Richard Charles Philip Patrick Kevin Brian Eric Alan Gary Kenneth Steven Mark Andrew Gregory
Nicholas Jonathan Christopher Matthew Anthony Alexander Sebastian Vincent Julian Adrian Fabian Stefan Marco Luca
Matteo Giovanni Pablo Diego Carlos Miguel Javier Rafael Pedro Antonio Ivan Boris Dmitri Igor Nikolai Sven Lars Erik
Olaf Magnus Nils Anders Jonas Jakob Emil Anton Viktor Tomas Marek Jan Piotr Pawel
""".split()

_WOMEN = """
Anna Maria Emma Olivia Sophia Mia Adele Agnes Alice Amelia Amy Andrea
Angela Barbara Beatrice Betty Bianca Camille Carla Caroline Catherine Charlotte Chloe Clara Claire Daisy Diana Donna
Dorothy Edith Elena Elisa Elizabeth Ella Ellen Emily Erica Esther Eva Evelyn Fiona Flora Florence Frances Grace Greta
Hannah Harriet Heidi Helen Ida Ingrid Irene Iris Isabel Ivy Jane Jasmine Jennifer Jessica Joan Judith Julia Karen
Kate Laura Lena Leah Lily Linda Lisa Louise Lucy Lydia Margaret Martha Matilda Megan Melissa Monica Nancy Naomi
Natalie Nina Nora Pamela Patricia Paula Petra Phoebe Rachel Rebecca Rita Rosa Ruby Ruth Sandra Sara Sharon Silvia
Sonia Stella Susan Sylvia Tamara Tanya Teresa Tina Ursula Valerie Vera Veronica Victoria Violet Wendy Yvonne Zoe
""".split()

_PETS = """
Rex Bella Luna Rocky Buddy Coco Milo Simba Oreo Ginger Pepper Cookie Biscuit Muffin Whiskers Shadow Smokey Tiger Lucky
Charlie Bailey Duke Bear Toby Jasper Snowball Patches Mittens Socks Nugget Peanut Pumpkin Waffles Pickles Bandit Scout
Ranger Hunter Ziggy Gizmo Pixel Comet Rocket Thunder Storm Misty Sunny Dusty Rusty Sparky Fluffy Fuzzy Bubbles Nemo
Dory Garfield Felix Oscar Daisy Ruby Rosie Poppy
""".split()

_CITIES = """
Oslo, Paris, London, Berlin, Madrid, Rome, Vienna, Prague, Warsaw, Krakow, Budapest, Athens, Lisbon, Porto, Dublin,
Edinburgh, Glasgow, Manchester, Liverpool, Bristol, Leeds, Oxford, Cambridge, Cardiff, Belfast, Amsterdam, Rotterdam,
Utrecht, Brussels, Antwerp, Ghent, Luxembourg, Zurich, Geneva, Basel, Bern, Munich, Hamburg, Frankfurt, Cologne,
Stuttgart, Dresden, Leipzig, Bremen, Copenhagen, Aarhus, Stockholm, Gothenburg, Helsinki, Bergen, Reykjavik, Tallinn,
Riga, Vilnius, Minsk, Kiev, Moscow, Bucharest, Sofia, Belgrade, Zagreb, Ljubljana, Sarajevo, Istanbul, Ankara, Barcelona,
Seville, Valencia, Malaga, Granada, Milan, Turin, Venice, Florence, Naples, Bologna, Genoa, Palermo, Lyon, Marseille,
Nice, Bordeaux, Lille, Toulouse, Nantes, Cairo, Casablanca, Tunis, Nairobi, Lagos, Accra, Dakar, Johannesburg, Durban,
Dubai, Doha, Tehran, Baghdad, Beirut, Jerusalem, Delhi, Mumbai, Chennai, Karachi, Lahore, Dhaka, Kathmandu, Bangkok,
Hanoi, Jakarta, Manila, Singapore, Tokyo, Osaka, Kyoto, Seoul, Busan, Beijing, Shanghai, Taipei, Sydney, Melbourne,
Brisbane, Perth, Auckland, Wellington, Boston, Chicago, Dallas, Denver, Detroit, Houston, Miami, Phoenix, Portland,
Seattle, Atlanta, Austin, Nashville, Memphis, Orlando, Philadelphia, Baltimore, Cleveland, Toronto, Montreal, Vancouver,
Ottawa, Calgary, Havana, Bogota, Lima, Quito, Santiago, Montevideo
"""

_JOBS = """
teacher, doctor, nurse, engineer, lawyer, baker, butcher, carpenter, plumber, electrician, painter, sculptor, musician,
singer, actor, dancer, writer, journalist, editor, translator, librarian, historian, chemist, biologist, physicist,
astronomer, geologist, mathematician, statistician, economist, accountant, banker, cashier, waiter, chef, bartender,
barista, farmer, gardener, florist, fisherman, forester, miner, welder, mechanic, driver, pilot, sailor, captain,
soldier, policeman, detective, firefighter, paramedic, dentist, surgeon, pharmacist, psychologist, therapist, optician,
veterinarian, programmer, designer, architect, surveyor, photographer, jeweler, tailor, shoemaker, hairdresser, barber,
model, athlete, coach, referee, judge, diplomat, politician, secretary, manager, consultant, salesman, receptionist,
janitor, porter, courier, postman, butler, nanny, tutor, professor, scientist, zookeeper, beekeeper, locksmith,
watchmaker, bricklayer, roofer, magician, clown
"""

_FOODS = """
pizza, pasta, lasagna, sushi, ramen, curry, risotto, paella, tacos, burritos, nachos, burgers, hotdogs, steak, meatballs,
sausages, bacon, chicken, turkey, duck, salmon, tuna, shrimp, lobster, oysters, omelette, pancakes, waffles, porridge,
cereal, toast, bagels, pretzels, croissants, sandwiches, salad, soup, stew, goulash, dumplings, noodles, rice, beans,
lentils, hummus, falafel, kebab, tofu, cheese, yogurt, chocolate, cake, pie, brownies, cookies, donuts, muffins, pudding,
strawberries, mango, bananas, apples, grapes, cherries, watermelon, potatoes, mushrooms, broccoli, spinach, avocado
"""

_DRINKS = """
coffee, tea, water, milk, lemonade, cola, cocoa, cider, beer, wine, whisky, vodka, rum, gin, champagne, espresso,
cappuccino, latte, matcha, kombucha, orange juice, apple juice, tomato juice, ginger ale, iced tea, smoothies
"""

_COLOURS = """
red, green, blue, yellow, purple, orange, pink, brown, black, white, grey, turquoise, violet, gold, silver, beige,
maroon, navy, teal, olive, lavender, indigo, crimson, magenta, cyan, scarlet, khaki, ivory
"""

_SPORTS = """
football, basketball, baseball, tennis, volleyball, handball, rugby, cricket, hockey, golf, boxing, wrestling, judo,
karate, fencing, archery, swimming, diving, surfing, sailing, rowing, skiing, snowboarding, skating, cycling, running,
climbing, gymnastics, badminton, squash, bowling, billiards, darts, polo
"""

_ANIMALS = """
dog, cat, hamster, rabbit, parrot, goldfish, turtle, lizard, snake, horse, pony, goat, ferret, canary, hedgehog, spider
"""

_WILD = """
lion, tiger, elephant, giraffe, zebra, monkey, gorilla, panda, koala, kangaroo, wolf, fox, bear, deer, moose, otter,
beaver, squirrel, dolphin, whale, shark, octopus, penguin, owl, eagle, falcon, swan, flamingo, crocodile, frog, bee,
butterfly, camel, llama, hippo, rhino, leopard, cheetah, seal, walrus
"""

_INSTRUMENTS = """
piano, guitar, violin, cello, flute, clarinet, oboe, bassoon, trumpet, trombone, tuba, saxophone, drums, harp, banjo,
ukulele, mandolin, accordion, harmonica, organ, bagpipes, bass, viola, xylophone
"""

_LANGUAGES = """
English, French, German, Spanish, Italian, Portuguese, Dutch, Danish, Swedish, Norwegian, Finnish, Icelandic, Polish,
Czech, Hungarian, Romanian, Bulgarian, Greek, Turkish, Russian, Ukrainian, Arabic, Hebrew, Persian, Hindi, Bengali, Tamil,
Chinese, Japanese, Korean, Vietnamese, Thai, Swahili, Latin, Irish, Welsh
"""

_COUNTRIES = """
Japan, China, India, Thailand, Vietnam, Indonesia, Nepal, Mongolia, Australia, New Zealand, Canada, Mexico, Cuba, Jamaica,
Brazil, Argentina, Chile, Peru, Bolivia, Colombia, Ecuador, Iceland, Norway, Sweden, Finland, Denmark, Ireland, Scotland,
England, France, Spain, Portugal, Italy, Greece, Malta, Croatia, Germany, Austria, Switzerland, Poland, Hungary, Turkey,
Egypt, Morocco, Kenya, Tanzania, Namibia, Madagascar, Israel, Jordan, Georgia, Russia, Korea, Estonia
"""

_CARS = """
Toyota, Honda, Ford, Volvo, Audi, Tesla, Mazda, Nissan, Fiat, Renault, Peugeot, Skoda, Opel, Kia, Hyundai, Subaru, Jeep,
Porsche, Ferrari, Jaguar, Lexus, Suzuki, Citroen, Mercedes, Chevrolet, Cadillac, Dodge, Bentley, Lada, Mini
"""

_MUSIC = """
jazz, rock, pop, blues, classical, country, folk, metal, punk, techno, reggae, disco, opera, soul, funk, gospel, swing,
salsa, grunge, ambient
"""

_MONTHS = "January February March April May June July August September October November December".split()
_SEASONS = ["spring", "summer", "autumn", "winter"]


def _split(text: str) -> tuple[str, ...]:
    return tuple(value.strip() for value in " ".join(text.split()).split(",") if value.strip())


VALUES: dict[str, tuple[str, ...]] = {
    "people": tuple(_MEN + _WOMEN),
    "men": tuple(_MEN),
    "women": tuple(_WOMEN),
    "pets": tuple(_PETS),
    "cities": _split(_CITIES),
    "jobs": _split(_JOBS),
    "foods": _split(_FOODS),
    "drinks": _split(_DRINKS),
    "colours": _split(_COLOURS),
    "sports": _split(_SPORTS),
    "animals": _split(_ANIMALS),
    "wild_animals": _split(_WILD),
    "instruments": _split(_INSTRUMENTS),
    "languages": _split(_LANGUAGES),
    "countries": _split(_COUNTRIES),
    "cars": _split(_CARS),
    "music": _split(_MUSIC),
    "months": tuple(_MONTHS),
    "seasons": tuple(_SEASONS),
    "ages": tuple(str(age) for age in range(16, 90)),
    "numbers": tuple(str(number) for number in range(1, 100)),
}
"""Value lists by kind."""
